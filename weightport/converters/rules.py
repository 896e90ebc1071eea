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
        fused_qkv("visual.blocks.*.attn.qkv.{weight,bias}", into="….*.{part}_proj.{weight,bias}"),
        unstack("llm/layers/mlp/linear", "model.layers.*.mlp.down_proj.weight", each=Permute((1, 0))),
        tie("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", to="model.encoder.embed_tokens.weight"),
        derive("*.token_rp_bucket", token_bucket, because="recomputed from token_bucket_size"),
    )

Left is what the file holds, right is what transformers calls it. Every rule can be read backwards: the same table
exports a model to its original format.
'''

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from weightport.converters.operations import COPY, Chain, Concatenate, Operation, Permute, Split, Stack, Unstack
from weightport.converters.patterns import Capture, Pattern, check_correspondence

Derivation = Callable[[Any, str], torch.Tensor]
"""(configuration, source name) → the tensor that the original holds under that name."""


@dataclass(frozen=True)
class Claim:
    """That a tensor falls under a rule: the captures that its group of tensors shares, and its place in the group.

    `layer` is the tensor's place along a stacked axis, 0 where the rule has none. `pattern` is its place among the
    rule's patterns of that side (sources, then aliases).
    """

    rule: Rule
    captures: tuple[Capture, ...]
    pattern: int
    layer: int = 0

    @property
    def group(self) -> tuple[int, tuple[Capture, ...]]:
        """What the tensors of one application of the rule have in common."""
        return id(self.rule), self.captures

    @property
    def place(self) -> tuple[int, int]:
        """Where the tensor stands among those of its side: layer by layer."""
        return self.layer, self.pattern


@dataclass(frozen=True)
class Rule:
    """Source patterns → target patterns through one operation.

    `aliases` are further source names of the first source's tensor (tied weights): the original stores it under each
    of them. Present ones must be equal to it bit for bit; they are written once, and all of them are exported.

    `stacked` names the side that has a tensor for every layer where the other side has one tensor of all layers (its
    operation is an Unstack or a Stack): the first `*` of its patterns is the layer, and the other side has no such
    hole.
    """

    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]
    operation: Operation = COPY
    aliases: tuple[Pattern, ...] = ()
    stacked: Literal["sources", "targets"] | None = None

    def __post_init__(self) -> None:
        for pattern in (*self.sources[1:], *self.aliases):
            check_correspondence(self.sources[0], pattern)
        for pattern in self.targets[1:]:
            check_correspondence(self.targets[0], pattern)
        check_correspondence(
            self.sources[0], self.targets[0], left_only=self._only(left=True), right_only=self._only(left=False)
        )

    def claims_of_source(self, name: str) -> Iterator[Claim]:
        """Every way in which the source `name` falls under this rule."""
        yield from self._claims((*self.sources, *self.aliases), name, self.stacked == "sources")

    def claims_of_target(self, name: str) -> Iterator[Claim]:
        """Every way in which the target `name` falls under this rule."""
        yield from self._claims(self.targets, name, self.stacked == "targets")

    def source_names(self, captures: tuple[Capture, ...], layers: int = 1) -> list[str]:
        """The names of all sources of one application, layer by layer where they are stacked."""
        return _names(self.sources, captures, layers if self.stacked == "sources" else None)

    def target_names(self, captures: tuple[Capture, ...], layers: int = 1) -> list[str]:
        """The names of all targets of one application, layer by layer where they are stacked."""
        return _names(self.targets, captures, layers if self.stacked == "targets" else None)

    def alias_names(self, captures: tuple[Capture, ...]) -> list[str]:
        """The further names of the first source's tensor."""
        return _names(self.aliases, captures, None)

    def _claims(self, patterns: tuple[Pattern, ...], name: str, stacked: bool) -> Iterator[Claim]:
        for place, pattern in enumerate(patterns):
            captures = pattern.match(name)
            if captures is None:
                continue
            if not stacked:
                yield Claim(self, captures, place)
                continue
            hole = pattern.layer_hole
            layer = captures[hole]
            yield Claim(self, (*captures[:hole], *captures[hole + 1 :]), place, int(layer))

    def _only(self, *, left: bool) -> int | None:
        """The hole that only this side's patterns have: the layer's."""
        if self.stacked != ("sources" if left else "targets"):
            return None
        return (self.sources if left else self.targets)[0].layer_hole


def _names(patterns: tuple[Pattern, ...], captures: tuple[Capture, ...], layers: int | None) -> list[str]:
    if layers is None:
        return [pattern.fill(captures) for pattern in patterns]
    return [pattern.fill_layer(captures, layer) for layer in range(layers) for pattern in patterns]


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
    """A source tensor with no place in the target. An export leaves it out, unless it is `kept` beside the model."""

    source: Pattern
    because: str
    kept: bool = False


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

    def of_source(self, name: str) -> Iterator[Claim]:
        """Every claim on the source `name`."""
        for rule in self.rules:
            yield from rule.claims_of_source(name)

    def of_target(self, name: str) -> Iterator[Claim]:
        """Every claim on the target `name`."""
        for rule in self.rules:
            yield from rule.claims_of_target(name)

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


def fused_qkv(source: str, into: str, sizes: tuple[int, int, int] | None = None) -> Rule:
    """Query, key and value in one matrix, rows of query first; `into` has {part} where q, k and v differ.

    `sizes` are the rows of each where keys and values have fewer heads than queries.
    """
    targets = _patterns(tuple(into.replace("{part}", part) for part in "qkv"))
    return Rule((Pattern(source),), targets, Split(3, 0, sizes))


def unstack(source: str, *targets: str, each: Operation = COPY) -> Rule:
    """One tensor of all layers → the tensors of each layer; the first `*` of the targets is the layer."""
    return Rule((Pattern(source),), _patterns(targets), Unstack(each), stacked="targets")


def stack(target: str, *sources: str, each: Operation = COPY) -> Rule:
    """The tensors of each layer → one tensor of all layers; the first `*` of the sources is the layer."""
    return Rule(_patterns(sources), (Pattern(target),), Stack(each), stacked="sources")


def gated_mlp(source: str, gate: str, up: str, each: Operation = COPY) -> Rule:
    """Gate and up projection of all layers in one tensor [layers, 2, …]; `each` takes one to its native form."""
    halves = Chain((Unstack(parts=2), each))
    return Rule((Pattern(source),), _patterns((gate, up)), Unstack(halves), stacked="targets")


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


def keep(source: str, because: str) -> Dropped:
    """A tensor with no place in the native model, which stands in a file of its own beside it for the way back."""
    return Dropped(Pattern(source), because, kept=True)


def fill(target: str, value: float, because: str, dtype: torch.dtype | None = None) -> Filled:
    """A target that the source does not hold."""
    return Filled(Pattern(target), value, because, dtype)


def computed(target: str, compute: Callable[[tuple[int, ...]], torch.Tensor], because: str) -> Filled:
    """A target that the source does not hold, and that its shape determines."""
    return Filled(Pattern(target), 0.0, because, compute=compute)
