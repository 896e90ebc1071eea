"""Several checkpoints as one: the tensors of every source under one set of names, each knowing where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightport.checkpoints.types import Checkpoint, NamedTensors
from weightport.file_state import FileState

MAIN = "checkpoint"
"""The source that every conversion has, and that `document`s and companions are looked for in."""


@dataclass(frozen=True)
class Sources:
    """The opened checkpoints of one conversion, by the names that the family gives them."""

    checkpoints: Mapping[str, Checkpoint]

    @property
    def main(self) -> Checkpoint:
        return self.checkpoints[MAIN]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all sources, those of the main one first."""
        ordered = (MAIN, *(name for name in self.checkpoints if name != MAIN))
        return tuple(dict.fromkeys(file for name in ordered for file in self.checkpoints[name].files))

    @property
    def states(self) -> dict[Path, FileState]:
        """Every file as it was when it was opened."""
        return {path: state for checkpoint in self.checkpoints.values() for path, state in checkpoint.states.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoints

    def __getitem__(self, name: str) -> Checkpoint:
        return self.checkpoints[name]


@dataclass(frozen=True)
class CombinedTensors:
    """The tensors of several sources under one set of names.

    `origins` names the source of every tensor. `shadowed` are the tensors of a source that another one gives too, with
    the source that was preferred: they are accounted for, and not used.
    """

    tensors: NamedTensors
    origins: Mapping[str, str]
    shadowed: Mapping[str, NamedTensors] = field(default_factory=dict)


def combine(parts: Mapping[str, NamedTensors]) -> CombinedTensors:
    """One checkpoint of several sources' tensors, already under the names of the whole; nothing is read.

    Where two sources hold a tensor of one name, the source that stands first in `parts` gives it.
    """
    origins: dict[str, str] = {}
    chosen = []
    shadowed: dict[str, NamedTensors] = {}
    for source, tensors in parts.items():
        hidden = [name for name in tensors if name in origins]
        chosen += [ref for name, ref in tensors.items() if name not in origins]
        if hidden:
            shadowed[source] = NamedTensors(tensors[name] for name in hidden)
        origins |= {name: source for name in tensors if name not in origins}
    return CombinedTensors(NamedTensors(chosen), origins, shadowed)
