"""The released text models, and what no shape tells of each.

Sources: google-research/big_vision at 0127fb6, models/ppp/gemma.py (get_config). Importing this imports no torch:
command lines are made of the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QueryScale = Literal["head", "width"]


@dataclass(frozen=True)
class TextShape:
    """Sizes of a text model that show in its tensors."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    mlp: int


@dataclass(frozen=True)
class Variant:
    """A released model. `generation` is Gemma's: 1 or 2. `query_scale`: attention scores are divided by the square
    root of a head's width, or of the model's width by its number of heads."""

    name: str
    shape: TextShape
    generation: int = 2
    query_scale: QueryScale = "head"


VARIANTS = (
    Variant("3b", TextShape(2304, 26, 8, 4, 256, 9216)),
    Variant("10b", TextShape(3584, 42, 16, 8, 256, 14336)),
    Variant("28b", TextShape(4608, 46, 32, 16, 128, 36864), query_scale="width"),
    Variant("paligemma-3b", TextShape(2048, 18, 8, 1, 256, 16384), generation=1),
)
"""PaliGemma 2 in three sizes; `paligemma-3b` is PaliGemma 1."""

NAMES = tuple(variant.name for variant in VARIANTS)

ATTENTION_SOFTCAP = 50.0
"""Of every Gemma 2."""


def variant_named(name: str) -> Variant:
    """The variant called `name`, which is one of NAMES."""
    return next(variant for variant in VARIANTS if variant.name == name)


def variant_of(shape: TextShape, generation: int) -> Variant | None:
    """The released model of these sizes; None for any other."""
    return next((each for each in VARIANTS if (each.shape, each.generation) == (shape, generation)), None)
