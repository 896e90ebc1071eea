"""Native tensors under the original's names: the family's rule table, read backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from weightport.checkpoints import open_checkpoint
from weightport.converters.family import ConversionStage
from weightport.converters.name_spaces import name_space
from weightport.converters.operations import applied
from weightport.converters.record import read_record
from weightport.converters.rules import RuleTable


@dataclass(frozen=True)
class Originals:
    """What the original calls the tensors of a converted model.

    `in_memory`: what the running model calls a tensor, by its name on disk, where these differ. `sections` are what
    stood before the names that the rules speak of in the original's file, where a reference may name them too.
    """

    rules: RuleTable
    in_memory: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ()

    def tensor(self, name: str, native: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The tensor that the original calls `name`, made of native ones (weights, gradients or buffers alike), which
        have the running model's names.

        A tied parameter is one tensor under several names. None when the original's name, or what it became, is
        unknown.
        """
        shorter = (name.removeprefix(f"{section}.") for section in self.sections)
        claim = next((claim for each in (name, *shorter) for claim in self.rules.of_source(each)), None)
        if claim is None:
            # What the native model has no place for, and the family computes with all the same.
            return native.get(name)
        rule, layers = claim.rule, 1
        if rule.stacked == "targets":
            # As many layers as the model has.
            while all(self._own(each) in native for each in rule.target_names(claim.captures, layers + 1)):
                layers += 1
        targets = [native.get(self._own(each)) for each in rule.target_names(claim.captures, layers)]
        present = [target for target in targets if target is not None]
        if len(present) < len(targets):
            return None
        place = claim.pattern + claim.layer * len(rule.sources) if claim.pattern < len(rule.sources) else 0
        return applied(rule.operation.backward, present)[place]

    def _own(self, stored: str) -> str:
        return self.in_memory.get(stored, stored)


def originals_of(directory: Path, conversion: ConversionStage, model: PreTrainedModel) -> Originals:
    """The original's names for the `model` of a converted directory, in the layout it came from (without a record, the
    default one)."""
    directory = Path(directory)
    record = read_record(directory) or {}
    rules = conversion.rules_of(model.config, record.get("layout", ""))
    stored = {name: ref.shape for name, ref in open_checkpoint(directory).items()}
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    sections = tuple(each["section"] for each in record.get("sources", {}).values() if each.get("section"))
    if known.issuperset(stored):
        return Originals(rules, sections=sections)
    whole = {
        pieces[0].stored: name for name, pieces in name_space(directory, stored).made_of.items() if len(pieces) == 1
    }
    return Originals(rules, whole, sections)
