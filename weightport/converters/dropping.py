"""Source tensors that the user gives up (--drop)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightport.checkpoints import TensorRef
from weightport.converters.patterns import Pattern
from weightport.errors import UsageError

SHOWN = 3


def given_up(tensors: Mapping[str, TensorRef], patterns: Iterable[str], section: str = "") -> dict[str, str]:
    """Reason by name of every tensor that one of `patterns` describes.

    A pattern may speak of a tensor as the model calls it or as the file does: `section` and a dot (in an .npz a slash)
    before it.
    """
    compiled = [Pattern(text) for text in patterns]
    before = ("", f"{section}.", f"{section}/") if section else ("",)
    return {
        name: f"left out on request (--drop {pattern})"
        for name in tensors
        for pattern in compiled
        if any(pattern.match(start + name) is not None for start in before)
    }


def check_patterns(tensors: Mapping[str, TensorRef], patterns: Sequence[str], section: str = "") -> None:
    """Raise UsageError for a pattern that describes no tensor: what it was to leave out would be converted."""
    for text in patterns:
        if not given_up(tensors, [text], section):
            shown = ", ".join(list(tensors)[:SHOWN])
            raise UsageError(
                f"--drop {text} matches none of the model's {len(tensors)} tensors ({shown}, …).\n"
                "  In a pattern * is a number, ** anything, {a,b} either; `weightport inspect SOURCE --tensors` lists "
                "the names."
            )
