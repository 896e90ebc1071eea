"""Native tensors under the original's names: the family's rule table, read backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from weightport.converters.record import read_record
from weightport.converters.rules import RuleTable
from weightport.families import FAMILIES as CONVERTERS


@dataclass(frozen=True)
class Originals:
    """What the original calls the tensors of a converted model."""

    rules: RuleTable

    def tensor(self, name: str, native: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The tensor that the original calls `name`, made of native ones (weights, gradients or buffers alike).

        A tied parameter is one tensor under several names. None when the original's name, or what it became, is
        unknown.
        """
        for rule, place, captures in self.rules.of_source(name):
            targets = [native.get(pattern.fill(captures)) for pattern in rule.targets]
            present = [target for target in targets if target is not None]
            if len(present) < len(targets):
                return None
            return rule.operation.backward(present)[place if place < len(rule.sources) else 0]
        return None


def originals_of(directory: Path, family: str, config: PreTrainedConfig) -> Originals:
    """The original's names for a converted directory, in the layout it came from (without a record, the default
    one)."""
    record = read_record(Path(directory)) or {}
    return Originals(CONVERTERS[family].rules_of(config, record.get("layout", "")))
