"""Operations made of operations: one after the other, and one for every layer of a stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from weightport.checkpoints.lazy_tensors import Lazy, LazyTensor
from weightport.checkpoints.types import TensorRef
from weightport.converters.low_rank_pair import LowRankPair
from weightport.converters.operations.operation import Copy, Operation, dtype_name, has_own_rows


@dataclass(frozen=True)
class Chain(Operation):
    """`steps` one after the other; a step that takes one tensor takes each of those before it in turn."""

    steps: tuple[Operation, ...]

    @property
    def name(self) -> str:
        return ", ".join(step.name for step in self.steps)

    @property
    def sources(self) -> int | None:
        return _count([step.sources for step in self.steps], first=True)

    @property
    def targets(self) -> int | None:
        return _count([step.targets for step in self.steps], first=False)

    @property
    def lossy(self) -> str | None:
        return "; ".join(what for step in self.steps if (what := step.lossy)) or None

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        made = list(sources)
        for step in self.steps:
            made = _each(step.forward, step.sources, made)
        return made

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        made = list(targets)
        for step in reversed(self.steps):
            made = _each(step.backward, step.targets, made)
        return made

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        made = [pair]
        for step in self.steps:
            made = [after for each in made for after in step.pairs(each)]
        return made


@dataclass(frozen=True)
class Unstack(Operation):
    """One tensor of all layers (axis 0) into the tensors of each layer, through `each`; backward stacks them.

    The targets stand layer by layer. One layer's bytes are read at a time, both ways. `parts` is the number of layers
    where it is known (the two halves of a fused matrix); None is as many as there are.
    """

    each: Operation = field(default_factory=Copy)
    parts: int | None = None

    @property
    def name(self) -> str:
        rest = "" if isinstance(self.each, Copy) else f", {self.each.name}"
        return f"unstack {self.parts or 'layers'}{rest}"

    @property
    def targets(self) -> int | None:
        return None if self.parts is None else self.parts * (self.each.targets or 1)

    @property
    def lossy(self) -> str | None:
        return self.each.lossy

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        (stacked,) = sources
        if not stacked.shape:
            raise ValueError("a scalar has no layers to take apart")
        if self.parts is not None and stacked.shape[0] != self.parts:
            raise ValueError(f"axis 0 of {stacked.shape} has not the {self.parts} parts")
        layers = (_layer(stacked, place) for place in range(stacked.shape[0]))
        return [target for layer in layers for target in self.each.forward([layer])]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        count = self.each.targets or 1
        if not targets or len(targets) % count:
            raise ValueError(f"{len(targets)} tensors are no whole number of layers of {count}")
        groups = (targets[start : start + count] for start in range(0, len(targets), count))
        return [_stacked([layer for group in groups for layer in self.each.backward(group)])]


@dataclass(frozen=True)
class Stack(Operation):
    """The tensors of each layer into one tensor of all layers (axis 0), through `each`; backward takes it apart."""

    each: Operation = field(default_factory=Copy)

    @property
    def name(self) -> str:
        rest = "" if isinstance(self.each, Copy) else f"{self.each.name}, "
        return f"{rest}stack layers"

    @property
    def sources(self) -> None:
        return None

    @property
    def lossy(self) -> str | None:
        return self.each.lossy

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        count = self.each.sources or 1
        if not sources or len(sources) % count:
            raise ValueError(f"{len(sources)} tensors are no whole number of layers of {count}")
        groups = (sources[start : start + count] for start in range(0, len(sources), count))
        return [_stacked([layer for group in groups for layer in self.each.forward(group)])]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        (stacked,) = targets
        layers = (_layer(stacked, place) for place in range(stacked.shape[0]))
        return [source for layer in layers for source in self.each.backward([layer])]


def _each(step: Callable[[Sequence[Lazy]], list[Lazy]], arity: int | None, tensors: list[Lazy]) -> list[Lazy]:
    """`step` on all tensors together, or on each in turn where it takes one and there are several."""
    if arity == 1 and len(tensors) > 1:
        return [made for tensor in tensors for made in step([tensor])]
    return step(tensors)


def _count(arities: Sequence[int | None], *, first: bool) -> int | None:
    """How many tensors a chain takes (or gives): the product of its steps', as single steps fan out."""
    known = [arity for arity in (arities if first else reversed(arities)) if arity != 1]
    return None if None in known else prod(arity for arity in known if arity)


def _stacked(tensors: Sequence[Lazy]) -> LazyTensor:
    first = tensors[0]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        found = ", ".join(sorted({f"{tensor.shape} {dtype_name(tensor.dtype)}" for tensor in tensors}))
        raise ValueError(f"the layers differ: {found}")

    def rows(start: int, stop: int) -> torch.Tensor:
        if stop - start == 1:
            return tensors[start].read()[None]
        return torch.stack([tensor.read() for tensor in tensors[start:stop]]) if start < stop else _none_of(first)

    return LazyTensor((len(tensors), *first.shape), first.dtype, rows)


def _none_of(tensor: Lazy) -> torch.Tensor:
    return torch.empty((0, *tensor.shape), dtype=tensor.dtype)


def _layer(stacked: Lazy, place: int) -> Lazy:
    """One layer of a stack, by the bytes of that layer alone."""
    if isinstance(stacked, TensorRef):
        return stacked.part(place)
    shape = tuple(stacked.shape[1:])

    def rows(start: int, stop: int) -> torch.Tensor:
        layer = stacked.rows(place, place + 1)[0]
        return layer[start:stop] if shape else layer

    return LazyTensor(shape, stacked.dtype, rows, has_own_rows(stacked))
