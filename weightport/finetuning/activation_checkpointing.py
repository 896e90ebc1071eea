"""Activation checkpointing (activations are computed again instead of kept), by the name that transformers has for it.

transformers 5.23 calls it activation checkpointing; 5.21, 5.22, guides and recipes call it gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

_NAMES = ("activation_checkpointing", "gradient_checkpointing")
_NAME = next(name for name in _NAMES if hasattr(PreTrainedModel, f"{name}_enable"))


def with_own_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments under this transformers' name for it; of both names, activation checkpointing counts."""
    own = dict(values)
    for end in ("", "_kwargs"):
        given = [own.pop(name + end) for name in _NAMES if name + end in own]
        if given:
            own[_NAME + end] = given[0]
    return own


def is_asked_for(arguments: TrainingArguments) -> bool:
    return bool(getattr(arguments, _NAME))


def is_on(model: Any) -> bool:
    """False too for what is no transformers' model."""
    return bool(getattr(model, f"is_{_NAME}", False))


def enable(model: Any) -> None:
    getattr(model, f"{_NAME}_enable")()


def disable(model: Any) -> None:
    getattr(model, f"{_NAME}_disable")()
