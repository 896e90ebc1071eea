"""Native tensors under the original's names: the family's rule table, read backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from weightport.converters.family import ConversionStage
from weightport.converters.operations import applied
from weightport.converters.record import read_record
from weightport.converters.rules import RuleTable


@dataclass(frozen=True)
class Originals:
    """What the original calls the tensors of a converted model."""

    rules: RuleTable

    def tensor(self, name: str, native: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The tensor that the original calls `name`, made of native ones (weights, gradients or buffers alike).

        A tied parameter is one tensor under several names. None when the original's name, or what it became, is
        unknown.
        """
        claim = next(self.rules.of_source(name), None)
        if claim is None:
            return None
        rule, layers = claim.rule, 1
        if rule.stacked == "targets":
            # As many layers as the model has.
            while all(each in native for each in rule.target_names(claim.captures, layers + 1)):
                layers += 1
        targets = [native.get(each) for each in rule.target_names(claim.captures, layers)]
        present = [target for target in targets if target is not None]
        if len(present) < len(targets):
            return None
        place = claim.pattern + claim.layer * len(rule.sources) if claim.pattern < len(rule.sources) else 0
        return applied(rule.operation.backward, present)[place]


def originals_of(directory: Path, conversion: ConversionStage, config: PreTrainedConfig) -> Originals:
    """The original's names for a converted directory, in the layout it came from (without a record, the default
    one)."""
    record = read_record(Path(directory)) or {}
    return Originals(conversion.rules_of(config, record.get("layout", "")))
