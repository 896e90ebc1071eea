"""How big_vision's files lay out a PaliGemma: what stands before its names, and which towers are stacked.

The original's own loader takes what is under `params`, else under `opt/target` (files of old trainers), else the whole
file; so does this. Towers whose layers flax scans hold the tensors of all layers in one, with the layer as axis 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weightport.checkpoints import Checkpoint, Record, TensorRef
from weightport.checkpoints.types import NamedTensors
from weightport.errors import UnsafeCheckpointError

PREFIXES = ("params", "opt/target", "")
_MARK = re.compile(r"llm/layers/(\d+/)?attn/(q|qkv)_einsum/w")
_SECTIONS = {"opt": "optimizer state", "chrono": "the trainer's counters"}


@dataclass(frozen=True)
class Towers:
    """Whether the layers of each tower are one tensor (stacked), or have tensors of their own."""

    vision_stacked: bool = True
    text_stacked: bool = True

    @property
    def name(self) -> str:
        """The layout's name in a record."""
        words = {True: "stacked", False: "unstacked"}
        return f"{words[self.vision_stacked]} vision, {words[self.text_stacked]} text"

    @classmethod
    def named(cls, name: str) -> Towers:
        """The layout that a record names; the released files' where it names none."""
        return next((each for each in _ALL if each.name == name), cls())


_ALL = tuple(Towers(vision, text) for vision in (True, False) for text in (True, False))


@dataclass(frozen=True)
class Found:
    """The model in a file: its tensors without `prefix`, their layout, and the bytes of everything else."""

    prefix: str
    tensors: NamedTensors
    towers: Towers
    unread: Mapping[str, int]


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before the model's names in a file; None where there is no PaliGemma in it."""
    known = tuple(names)
    for prefix in PREFIXES:
        start = f"{prefix}/" if prefix else ""
        if any(name.startswith(start) and _MARK.fullmatch(name, len(start)) for name in known):
            return prefix
    return None


def is_paligemma(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold a PaliGemma."""
    return prefix_of(names) is not None


def locate(checkpoint: Checkpoint) -> Found:
    """The PaliGemma in a checkpoint that has one. Raises UnsafeCheckpointError where some of it is pickled."""
    prefix = prefix_of(checkpoint) or ""
    _require_plain(checkpoint, f"{prefix}/" if prefix else "")
    tensors = checkpoint.section(prefix, "/")
    return Found(prefix, tensors, _towers(tensors), _unread(checkpoint, prefix))


def _require_plain(checkpoint: Checkpoint, start: str) -> None:
    document = checkpoint.document if isinstance(checkpoint.document, Mapping) else {}
    pickled = [name for name, value in document.items() if isinstance(value, Record) and name.startswith(start)]
    if pickled:
        raise UnsafeCheckpointError(
            f"{checkpoint.path}: {', '.join(pickled[:3])} {'is' if len(pickled) == 1 else 'are'} no plain array but "
            "pickled Python objects, which only executing the file could read. Where you trust it, save it again with "
            "numpy.savez and arrays of numbers."
        )


def _towers(names: Iterable[str]) -> Towers:
    known = tuple(names)
    return Towers(
        not any(name.startswith("img/Transformer/encoderblock_") for name in known),
        not any(re.match(r"llm/layers/\d+/", name) for name in known),
    )


def _unread(checkpoint: Mapping[str, TensorRef], prefix: str) -> dict[str, int]:
    """Bytes of what stands beside the model, by what it is."""
    if not prefix:
        return {}
    sizes: dict[str, int] = {}
    for name, ref in checkpoint.items():
        if not name.startswith(f"{prefix}/"):
            section = name.partition("/")[0]
            said = _SECTIONS.get(section, section)
            sizes[said] = sizes.get(said, 0) + ref.nbytes
    return sizes
