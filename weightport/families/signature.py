"""Tensor names that tell what kind of checkpoint a file is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Signature:
    """A tensor name that only this kind of checkpoint has: a regular expression over the whole name."""

    kind: str
    name: str

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.name)

    def fits(self, names: Sequence[str]) -> bool:
        """Whether one of `names` is such a name."""
        return any(map(self._pattern.fullmatch, names))
