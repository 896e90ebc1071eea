"""Which tensors of two checkpoints are to be compared: the models in them, under the names that both can have.

A training checkpoint holds its model below a key (`model.`), beside the optimizer's state; an export or a model
directory holds the model alone, often without the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from weightport.checkpoints import Checkpoint, TensorRef, sections

TRAINING_STATE = re.compile(
    r"(last_)?optim\w*|\w*optimizers?(_states?|_state_dict)?|extra_state|(lr_)?schedulers?(_states?|_state_dict)?"
    r"|(grad_)?scaler(_state|_state_dict)?|rng_states?|random_states?",
    re.IGNORECASE,
)
"""Sections of a checkpoint that are a trainer's and no model."""

TRIED = 3
"""Names of one side that are looked for at the end of the other side's."""


@dataclass(frozen=True)
class LeftOut:
    """A section of one side (`"A"` or `"B"`) that is no model, and how many tensors it holds."""

    side: str
    section: str
    tensors: int


@dataclass(frozen=True)
class Counterparts:
    """Both sides' tensors by the name to compare them under, the prefix taken off each, and what is left out."""

    a: Mapping[str, TensorRef]
    b: Mapping[str, TensorRef]
    prefixes: tuple[str, str]
    left_out: tuple[LeftOut, ...]


def counterparts(a: Checkpoint, b: Checkpoint) -> Counterparts:
    """What is to be compared of `a` and `b`. Training state that both hold is compared too."""
    left_out = (*_training_state("A", a, b), *_training_state("B", b, a))
    first, second = _kept(a, "A", left_out), _kept(b, "B", left_out)
    if first.keys() & second.keys():
        return Counterparts(first, second, ("", ""), left_out)
    before_a, before_b = _prefix(first, second), _prefix(second, first)
    return Counterparts(_without(before_a, first), _without(before_b, second), (before_a, before_b), left_out)


def _training_state(side: str, own: Checkpoint, other: Checkpoint) -> list[LeftOut]:
    there = {section.name for section in sections(other)}
    return [
        LeftOut(side, section.name, section.tensors)
        for section in sections(own)
        if section.name not in there and TRAINING_STATE.fullmatch(section.name)
    ]


def _kept(checkpoint: Checkpoint, side: str, left_out: tuple[LeftOut, ...]) -> dict[str, TensorRef]:
    gone = tuple(each.section + "." for each in left_out if each.side == side)
    return {name: ref for name, ref in checkpoint.items() if not name.startswith(gone)}


def _prefix(own: Mapping[str, TensorRef], other: Mapping[str, TensorRef]) -> str:
    """What stands before the other side's names in this side's ("" when they are not there)."""
    found = {
        name.removesuffix(wanted) for wanted in list(other)[:TRIED] for name in own if name.endswith("." + wanted)
    }
    return max(sorted(found), key=lambda prefix: sum(prefix + name in own for name in other), default="")


def _without(prefix: str, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    return {name.removeprefix(prefix): ref for name, ref in tensors.items()}
