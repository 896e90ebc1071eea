'''The rule table: a family's knowledge of names, written so that someone who knows the model can check it by eye.

    RULES = table(
        renames(
            "encoder.layers.*.",
            "model.encoder.layers.*.",
            """
            attn_ln.{weight,bias}     self_attn_output_norm.{weight,bias}
            fc{1,2}.{weight,bias}
            """,
        ),
        split("visual.blocks.*.attn.qkv.weight", into=("….*.q_proj.weight", "….*.k_proj.weight", "….*.v_proj.weight")),
        tie("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", to="model.encoder.embed_tokens.weight"),
        derive("*.token_rp_bucket", token_bucket, because="recomputed from token_bucket_size"),
    )

Left is what the file holds, right is what transformers calls it. Every rule can be read backwards: the same table
exports a model to its original format.
'''

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from weightport.converters.operations import COPY, Concatenate, Operation, Permute, Split
from weightport.converters.patterns import Capture, Pattern, check_correspondence

Derivation = Callable[[Any, str], torch.Tensor]
"""(configuration, source name) → the tensor that the original holds under that name."""


@dataclass(frozen=True)
class Rule:
    """Source patterns → target patterns through one operation.

    `aliases` are further source names of the first source's tensor (tied weights): the original stores it under each
    of them. Present ones must be equal to it bit for bit; they are written once, and all of them are exported.
    """

    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]
    operation: Operation = COPY
    aliases: tuple[Pattern, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.sources[1:], *self.aliases, *self.targets):
            check_correspondence(self.sources[0], pattern)


@dataclass(frozen=True)
class Derived:
    """A source tensor that the configuration alone determines: checked against it when read, recomputed when exported.

    `optional`: not every checkpoint of the layout holds it, and an export without a record leaves it out.
    """

    source: Pattern
    compute: Derivation
    because: str
    optional: bool = False


@dataclass(frozen=True)
class Dropped:
    """A source tensor with no place in the target, and none in an export."""

    source: Pattern
    because: str


@dataclass(frozen=True)
class Filled:
    """A target tensor that the source does not hold: every element `value`, or computed. An export leaves it out.

    `compute` takes the target's shape and gives its values (then `value` is not used). `dtype` None is the
    floating-point dtype of the model.
    """

    target: Pattern
    value: float
    because: str
    dtype: torch.dtype | None = None
    compute: Callable[[tuple[int, ...]], torch.Tensor] | None = None


@dataclass(frozen=True)
class RuleTable:
    """All rules of one layout. Which rule a name falls under does not depend on their order: a name has one rule."""

    rules: tuple[Rule, ...] = ()
    derived: tuple[Derived, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    filled: tuple[Filled, ...] = ()

    def __add__(self, other: RuleTable) -> RuleTable:
        return RuleTable(
            self.rules + other.rules,
            self.derived + other.derived,
            self.dropped + other.dropped,
            self.filled + other.filled,
        )

    def of_source(self, name: str) -> Iterator[tuple[Rule, int, tuple[Capture, ...]]]:
        """Every (rule, place among its sources then aliases, captures) under which the source `name` falls."""
        for rule in self.rules:
            for place, pattern in enumerate((*rule.sources, *rule.aliases)):
                captures = pattern.match(name)
                if captures is not None:
                    yield rule, place, captures

    def of_target(self, name: str) -> Iterator[tuple[Rule, int, tuple[Capture, ...]]]:
        """Every (rule, place among its targets, captures) under which the target `name` falls."""
        for rule in self.rules:
            for place, pattern in enumerate(rule.targets):
                captures = pattern.match(name)
                if captures is not None:
                    yield rule, place, captures

    def derivation_of(self, name: str) -> Derived | None:
        return next((row for row in self.derived if row.source.match(name) is not None), None)

    def drop_of(self, name: str) -> Dropped | None:
        return next((row for row in self.dropped if row.source.match(name) is not None), None)

    def filling_of(self, name: str) -> Filled | None:
        return next((row for row in self.filled if row.target.match(name) is not None), None)


Row = Rule | Derived | Dropped | Filled


def table(*rows: Row | RuleTable) -> RuleTable:
    """Rows and smaller tables as one table."""
    result = RuleTable()
    for row in rows:
        if isinstance(row, RuleTable):
            result += row
        elif isinstance(row, Rule):
            result += RuleTable(rules=(row,))
        elif isinstance(row, Derived):
            result += RuleTable(derived=(row,))
        elif isinstance(row, Dropped):
            result += RuleTable(dropped=(row,))
        else:
            result += RuleTable(filled=(row,))
    return result


def _patterns(texts: tuple[str, ...]) -> tuple[Pattern, ...]:
    return tuple(Pattern(text) for text in texts)


def move(source: str, target: str) -> Rule:
    """The same tensor under another name."""
    return Rule((Pattern(source),), (Pattern(target),))


def renames(source_prefix: str, target_prefix: str, rows: str) -> RuleTable:
    """A page of `move` rules: a line each, the source's name left, the target's right, or one name that both have."""
    made = []
    for line in rows.strip().splitlines():
        columns = line.split()
        if len(columns) > 2:
            raise ValueError(f"a line of renames has one or two names: {line!r}")
        made.append(move(source_prefix + columns[0], target_prefix + columns[-1]))
    return RuleTable(rules=tuple(made))


def permute(source: str, target: str, dims: tuple[int, ...] = (1, 0)) -> Rule:
    """Axes in another order; by default a transposed matrix."""
    return Rule((Pattern(source),), (Pattern(target),), Permute(dims))


def split(source: str, into: tuple[str, ...], dim: int = 0) -> Rule:
    """One tensor into equal parts along `dim`."""
    return Rule((Pattern(source),), _patterns(into), Split(len(into), dim))


def concatenate(sources: tuple[str, ...], target: str, dim: int = 0) -> Rule:
    """Equal parts joined along `dim`."""
    return Rule(_patterns(sources), (Pattern(target),), Concatenate(len(sources), dim))


def tie(source: str, *aliases: str, to: str) -> Rule:
    """One tensor that the original stores under several names."""
    return Rule((Pattern(source),), (Pattern(to),), aliases=_patterns(aliases))


def derive(source: str, compute: Derivation, because: str, optional: bool = False) -> Derived:
    """A tensor that the configuration determines."""
    return Derived(Pattern(source), compute, because, optional)


def drop(source: str, because: str) -> Dropped:
    """A tensor that is left out, and why."""
    return Dropped(Pattern(source), because)


def fill(target: str, value: float, because: str, dtype: torch.dtype | None = None) -> Filled:
    """A target that the source does not hold."""
    return Filled(Pattern(target), value, because, dtype)


def computed(target: str, compute: Callable[[tuple[int, ...]], torch.Tensor], because: str) -> Filled:
    """A target that the source does not hold, and that its shape determines."""
    return Filled(Pattern(target), 0.0, because, compute=compute)
