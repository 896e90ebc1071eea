"""Tensor-name patterns: what stands on both sides of a rule.

    encoder.layers.*.self_attn.{q,k,v,out}_proj.{weight,bias}

`*` is a layer number, `**` the rest of a name (any characters), `{a,b}` one of the alternatives. Each of them is a
*hole*. The holes of a rule's two sides correspond in order; alternatives correspond by their place in the braces, so
that `layer{1,2,3}.*` on one side and `stages.{0,1,2}.layers.*` on the other rename and renumber at once, both ways.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

_HOLE = re.compile(r"\*\*|\*|\{[^{}]*\}")

Capture = int | str
"""What a hole held: the number of a `*`, the text of a `**`, the place of an alternative in its braces."""


@dataclass(frozen=True)
class Pattern:
    """A name with holes. `match` reads captures from a name, `fill` writes them into one; they are inverses."""

    text: str

    @cached_property
    def holes(self) -> tuple[str, ...]:
        return tuple(_HOLE.findall(self.text))

    @cached_property
    def _literals(self) -> tuple[str, ...]:
        return tuple(_HOLE.split(self.text))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = [re.escape(self._literals[0])]
        for hole, literal in zip(self.holes, self._literals[1:]):
            parts += [_hole_regex(hole), re.escape(literal)]
        return re.compile("".join(parts), re.DOTALL)

    def match(self, name: str) -> tuple[Capture, ...] | None:
        """The captures of `name`, or None when the pattern does not describe it."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        return tuple(_read_hole(hole, text) for hole, text in zip(self.holes, found.groups()))

    def fill(self, captures: tuple[Capture, ...]) -> str:
        """The name that has `captures` in its holes."""
        if len(captures) != len(self.holes):
            raise ValueError(f"{self.text} has {len(self.holes)} holes, got {len(captures)} captures")
        out = [self._literals[0]]
        for hole, capture, literal in zip(self.holes, captures, self._literals[1:]):
            out += [_write_hole(hole, capture), literal]
        return "".join(out)

    @property
    def layer_hole(self) -> int:
        """The place among the holes of the first `*`. Raises ValueError where there is none."""
        if "*" not in self.holes:
            raise ValueError(f"{self} has no * for the layer")
        return self.holes.index("*")

    def fill_layer(self, captures: tuple[Capture, ...], layer: int) -> str:
        """The name that has `layer` in the first `*` and `captures` in the other holes."""
        hole = self.layer_hole
        return self.fill((*captures[:hole], layer, *captures[hole:]))

    def expand(self) -> list[str]:
        """Every name of a pattern whose holes are all alternatives."""
        return [self.fill(captures) for captures in product(*(range(len(_alternatives(hole))) for hole in self.holes))]

    def __str__(self) -> str:
        return self.text


def check_correspondence(
    left: Pattern, right: Pattern, *, left_only: int | None = None, right_only: int | None = None
) -> None:
    """Raise ValueError unless the holes of both sides correspond, so that a rule can be read in both directions.

    `left_only`, `right_only` are the place of a hole that the other side does not have.
    """
    left_holes = [hole for place, hole in enumerate(left.holes) if place != left_only]
    right_holes = [hole for place, hole in enumerate(right.holes) if place != right_only]
    if len(left_holes) != len(right_holes):
        raise ValueError(f"{left} and {right} have different numbers of holes")
    for a, b in zip(left_holes, right_holes):
        if a.startswith("{") != b.startswith("{") or (
            a.startswith("{") and len(_alternatives(a)) != len(_alternatives(b))
        ):
            raise ValueError(f"{a} in {left} does not correspond to {b} in {right}")
        if not a.startswith("{") and a != b:
            raise ValueError(f"{a} in {left} does not correspond to {b} in {right}")


@cache
def _alternatives(hole: str) -> tuple[str, ...]:
    return tuple(hole[1:-1].split(","))


def _hole_regex(hole: str) -> str:
    if hole == "**":
        return "(.+)"
    if hole == "*":
        return r"(0|[1-9]\d{0,8})"
    # Longest first: an alternative may begin another one.
    return "(" + "|".join(re.escape(text) for text in sorted(_alternatives(hole), key=len, reverse=True)) + ")"


def _read_hole(hole: str, text: str) -> Capture:
    if hole == "**":
        return text
    return int(text) if hole == "*" else _alternatives(hole).index(text)


def _write_hole(hole: str, capture: Capture) -> str:
    if hole in ("*", "**"):
        return str(capture)
    return _alternatives(hole)[int(capture)]
