"""What the formulas of additive methods work with: the weight that something is added to, and matrices by rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightport.adapters.reading.lora_config import MergeSettings
from weightport.adapters.reading.lora_settings import is_number
from weightport.converters.lora_patterns import shown
from weightport.errors import AdapterError

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ByRows:
    """A matrix [height, …] whose rows `of` computes: from the first to the last, excluded."""

    height: int
    of: Callable[[int, int], torch.Tensor]

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        values = self.of(start, stop)
        if values.shape != out.shape:
            raise ValueError(f"rows of {list(values.shape)}, not {list(out.shape)}")
        out.copy_(values)


@dataclass(frozen=True)
class Weight:
    """The weight that something is added to: its shape seen as [out, in], its kernel's, what the settings say, and
    `values`, which reads the base's as [out, in]."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    settings: MergeSettings
    module: str
    values: Callable[[], torch.Tensor]

    def strength(self, alpha: str = "alpha", rank: float | None = None) -> float:
        """alpha / rank, by the settings' patterns."""
        return self.number(alpha, "alpha_pattern") / (rank or self.settings.rank(self.module))

    def number(self, field: str, patterns: str | None = None) -> float:
        """A number of the settings. Raises AdapterError for anything else."""
        value: Any = self.settings.patterned(patterns, self.module, None) if patterns else None
        value = self.settings.data.get(field) if value is None else value
        if not is_number(value):
            raise AdapterError(f"{self.settings.where}: {field} is {shown(value)}; expected a number.")
        return float(value)

    def count(self, field: str, least: int = 1) -> int:
        """A whole number of the settings, at least `least`. Raises AdapterError for anything else."""
        value = self.settings.data.get(field)
        if type(value) is not int or not least <= value < 1 << 63:
            raise AdapterError(
                f"{self.settings.where}: {field} is {shown(value)}; expected a number of at least {least}."
            )
        return value
