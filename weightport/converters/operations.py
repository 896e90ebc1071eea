"""What may happen to tensors between a source name and a target name: operations that know their own inverse.

An operation takes lazy tensors to lazy tensors: shapes and dtypes at once, values when they are written. `forward`
goes from the original's tensors to the native ones, `backward` the other way; `backward(forward(sources))` equals the
sources bit for bit, but for the operations that say they are `lossy`. `pairs` says what the operation does to a LoRA
pair beside the weight. Operations chain, and one that works on a layer works on a stack of layers through `Unstack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch.nn import functional

from weightport.checkpoints.lazy_tensors import Lazy, LazyTensor, in_memory
from weightport.checkpoints.types import TensorRef
from weightport.converters.low_rank_pair import LowRankPair
from weightport.errors import AdapterError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """A step from `sources` tensors to `targets` tensors (None: as many as the tensors say, see Unstack).

    Raises ValueError from `forward` and `backward` for shapes that it does not apply to, and nothing has been read.
    """

    @property
    def name(self) -> str:
        """What it does, in the words of a plan's listing."""
        raise NotImplementedError

    @property
    def sources(self) -> int | None:
        return 1

    @property
    def targets(self) -> int | None:
        return 1

    @property
    def lossy(self) -> str | None:
        """What `backward` cannot restore, None where it restores everything."""
        return None

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        """The native tensors of the original's."""
        raise NotImplementedError

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        """The original's tensors of the native ones."""
        raise NotImplementedError

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        """The pairs beside the targets that do what `pair` does beside the source. Raises AdapterError where none
        does."""
        raise AdapterError(f"its weight goes through {self.name!r}, which a low-rank pair cannot follow")


def applied(step: Callable[[Sequence[Lazy]], Sequence[Lazy]], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`forward` or `backward` of an operation on tensors that are there."""
    return [made.read() for made in step([in_memory(tensor) for tensor in tensors])]


@dataclass(frozen=True)
class Copy(Operation):
    """One tensor, unchanged."""

    @property
    def name(self) -> str:
        return "copy"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return list(sources)

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return list(targets)

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        return [pair]


COPY = Copy()


@dataclass(frozen=True)
class Permute(Operation):
    """Axes in another order: `dims[i]` is the source axis that becomes axis i. (1, 0) transposes a matrix."""

    dims: Shape

    @property
    def name(self) -> str:
        return "transpose" if self.dims == (1, 0) else f"permute {self.dims}"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_permuted(source, self.dims) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        inverse = tuple(self.dims.index(axis) for axis in range(len(self.dims)))
        return [_permuted(target, inverse) for target in targets]

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        """(B·A)ᵀ = Aᵀ·Bᵀ: the sides change places."""
        if self.dims != (1, 0) or pair.magnitude is not None or pair.bias is not None:
            return super().pairs(pair)
        return [LowRankPair(pair.b.t().contiguous(), pair.a.t().contiguous())]


@dataclass(frozen=True)
class Split(Operation):
    """One tensor into `parts` pieces along `dim`, equal ones unless `sizes` says how large each is; backward joins."""

    parts: int
    dim: int = 0
    sizes: Shape | None = None

    @property
    def name(self) -> str:
        return f"split into {self.sizes or self.parts} along {self.dim}"

    @property
    def targets(self) -> int:
        return self.parts

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        (tensor,) = sources
        length = tensor.shape[self.dim]
        sizes = self.sizes or (length // self.parts,) * self.parts
        if sum(sizes) != length:
            what = f"parts of {self.sizes}" if self.sizes else f"{self.parts} equal parts"
            raise ValueError(f"axis {self.dim} of {tensor.shape} does not divide into {what}")
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        return [_narrowed(tensor, self.dim, start, size) for start, size in zip(starts, sizes)]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_joined(targets, self.dim)]

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        """Rows of the weight are rows of B, and of everything else that has one value an output; A is shared."""
        if self.dim != 0:
            raise AdapterError(f"its weight goes through {self.name!r}: only rows of a weight are split with its pair")

        def rows(tensor: torch.Tensor | None, dim: int = 0) -> Sequence[torch.Tensor | None]:
            if tensor is None:
                return [None] * self.parts
            return applied(Split(self.parts, dim, self.sizes).forward, [tensor])

        outputs = 0 if pair.magnitude is None or pair.magnitude.ndim == 1 else 1
        parts = zip(applied(self.forward, [pair.b]), rows(pair.magnitude, outputs), rows(pair.bias))
        return [LowRankPair(pair.a, b, magnitude, bias) for b, magnitude, bias in parts]


@dataclass(frozen=True)
class Concatenate(Operation):
    """`parts` equal tensors into one along `dim`; backward splits it."""

    parts: int
    dim: int = 0

    @property
    def name(self) -> str:
        return f"concatenate {self.parts} along {self.dim}"

    @property
    def sources(self) -> int:
        return self.parts

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_joined(sources, self.dim)]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return Split(self.parts, self.dim).forward(targets)


@dataclass(frozen=True)
class Reshape(Operation):
    """Another shape for the same row-major values; both shapes are stated, so that it can be undone.

    -1 on one side stands for what the other shape leaves, as in torch.
    """

    source: Shape
    target: Shape

    @property
    def name(self) -> str:
        return f"reshape {self.source} → {self.target}"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_reshaped(source, self.source, self.target) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_reshaped(target, self.target, self.source) for target in targets]


@dataclass(frozen=True)
class Pad(Operation):
    """`count` rows of zeros behind a tensor's own; backward takes them off."""

    count: int

    @property
    def name(self) -> str:
        return f"append {self.count} rows of zeros"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_padded(source, self.count) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_narrowed(target, 0, 0, target.shape[0] - self.count) for target in targets]

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        if pair.magnitude is not None:
            raise AdapterError(
                "the native model has rows of zeros below this weight's own, and DoRA divides each row by its length"
            )
        bias = None if pair.bias is None else applied(self.forward, [pair.bias])[0]
        return [LowRankPair(pair.a, applied(self.forward, [pair.b])[0], bias=bias)]


@dataclass(frozen=True)
class Truncate(Operation):
    """The last `count` rows left out, which hold nothing but `fill`; backward puts them back."""

    count: int
    fill: float = 0.0

    @property
    def name(self) -> str:
        return f"leave out the last {self.count} rows"

    @property
    def lossy(self) -> str | None:
        return f"the last {self.count} rows (written back as {self.fill:g})"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_narrowed(source, 0, 0, source.shape[0] - self.count) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_padded(target, self.count, self.fill) for target in targets]


@dataclass(frozen=True)
class Cast(Operation):
    """Another dtype. Lossy unless `target` holds every value of `source`."""

    source: torch.dtype
    target: torch.dtype

    @property
    def name(self) -> str:
        return f"cast {_dtype_name(self.source)} → {_dtype_name(self.target)}"

    @property
    def lossy(self) -> str | None:
        exact = torch.promote_types(self.source, self.target) == self.target
        return None if exact else f"digits beyond {_dtype_name(self.target)}"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_cast(source, self.source, self.target) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_cast(target, self.target, self.source) for target in targets]


@dataclass(frozen=True)
class Resize(Operation):
    """A table of positions [1 or none, extra + side², width] for another grid, by bicubic interpolation in float32.

    `extra` rows at the start (class tokens) stay as they are. Backward interpolates the other way, which does not give
    the same values: an export says so.
    """

    source: int
    target: int
    extra: int = 0

    @property
    def name(self) -> str:
        return f"interpolate positions {self.source}² → {self.target}²"

    @property
    def lossy(self) -> str | None:
        return None if self.source == self.target else f"the table of {self.source}² positions (interpolated back)"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_interpolated(source, self.source, self.target, self.extra) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_interpolated(target, self.target, self.source, self.extra) for target in targets]


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


def _permuted(tensor: Lazy, dims: Shape) -> LazyTensor:
    if len(dims) != len(tensor.shape):
        raise ValueError(f"{tensor.shape} has not the {len(dims)} axes of {dims}")
    shape = tuple(tensor.shape[axis] for axis in dims)
    if dims[:1] == (0,):
        return LazyTensor(
            shape, tensor.dtype, lambda start, stop: tensor.rows(start, stop).permute(dims), _by_rows(tensor)
        )
    return LazyTensor(shape, tensor.dtype, lambda start, stop: tensor.read().permute(dims)[start:stop], by_rows=False)


def _narrowed(tensor: Lazy, dim: int, start: int, size: int) -> LazyTensor:
    if size < 0:
        raise ValueError(f"axis {dim} of {tensor.shape} is too short")
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    if dim == 0:
        return LazyTensor(shape, tensor.dtype, lambda a, b: tensor.rows(start + a, start + b), _by_rows(tensor))
    return LazyTensor(shape, tensor.dtype, lambda a, b: tensor.rows(a, b).narrow(dim, start, size), _by_rows(tensor))


def _joined(tensors: Sequence[Lazy], dim: int) -> LazyTensor:
    first = tensors[0]
    rest = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
    if len(rest) > 1 or len({tensor.dtype for tensor in tensors}) > 1:
        found = ", ".join(f"{tensor.shape} {_dtype_name(tensor.dtype)}" for tensor in tensors)
        raise ValueError(f"tensors of {found} do not join along axis {dim}")
    shape = (*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :])
    by_rows = all(map(_by_rows, tensors))
    if dim:
        return LazyTensor(shape, first.dtype, lambda a, b: torch.cat([t.rows(a, b) for t in tensors], dim), by_rows)

    def rows(start: int, stop: int) -> torch.Tensor:
        parts, before = [], 0
        for tensor in tensors:
            low, high = max(start - before, 0), min(stop - before, tensor.shape[0])
            if low < high:
                parts.append(tensor.rows(low, high))
            before += tensor.shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else first.rows(0, 0)

    return LazyTensor(shape, first.dtype, rows, by_rows)


def _stacked(tensors: Sequence[Lazy]) -> LazyTensor:
    first = tensors[0]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        found = ", ".join(sorted({f"{tensor.shape} {_dtype_name(tensor.dtype)}" for tensor in tensors}))
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

    return LazyTensor(shape, stacked.dtype, rows, _by_rows(stacked))


def _reshaped(tensor: Lazy, source: Shape, target: Shape) -> LazyTensor:
    given = torch.empty(tensor.shape, device="meta")
    if -1 in source:
        # The stated sizes must be the tensor's own; what is open is its own too.
        fits = len(source) == len(tensor.shape) and all(a in (-1, b) for a, b in zip(source, tensor.shape))
    else:
        fits = tuple(source) == tensor.shape
    if not fits:
        raise ValueError(f"{tensor.shape} is not the stated {source}")
    try:
        shape = tuple(given.reshape(target).shape)
    except RuntimeError as error:
        raise ValueError(f"{tensor.shape} does not reshape to {target}") from error
    if shape[:1] == tensor.shape[:1] and shape:
        return LazyTensor(
            shape,
            tensor.dtype,
            lambda start, stop: tensor.rows(start, stop).reshape(stop - start, *shape[1:]),
            _by_rows(tensor),
        )

    def rows(start: int, stop: int) -> torch.Tensor:
        whole = tensor.read().reshape(shape)
        return whole[start:stop] if shape else whole

    return LazyTensor(shape, tensor.dtype, rows, by_rows=False)


def _padded(tensor: Lazy, count: int, value: float = 0.0) -> LazyTensor:
    own, rest = tensor.shape[0], tensor.shape[1:]

    def rows(start: int, stop: int) -> torch.Tensor:
        added = max(stop - max(start, own), 0)
        kept = tensor.rows(min(start, own), min(stop, own))
        return torch.cat([kept, kept.new_full((added, *rest), value)]) if added else kept

    return LazyTensor((own + count, *rest), tensor.dtype, rows, _by_rows(tensor))


def _cast(tensor: Lazy, source: torch.dtype, target: torch.dtype) -> LazyTensor:
    if tensor.dtype != source:
        raise ValueError(f"expected {_dtype_name(source)}, found {_dtype_name(tensor.dtype)}")
    return LazyTensor(tensor.shape, target, lambda start, stop: tensor.rows(start, stop).to(target), _by_rows(tensor))


def _interpolated(tensor: Lazy, source: int, target: int, extra: int) -> LazyTensor:
    if source == target:
        return LazyTensor(tensor.shape, tensor.dtype, tensor.rows)
    lead, width = tensor.shape[:-2], tensor.shape[-1]
    if tensor.shape[-2] != extra + source**2:
        raise ValueError(f"{tensor.shape} is no table of {extra} + {source}² positions")
    shape = (*lead, extra + target**2, width)

    def rows(start: int, stop: int) -> torch.Tensor:
        table = tensor.read().reshape(-1, width)
        grid = table[extra:].float().reshape(1, source, source, width).permute(0, 3, 1, 2)
        if grid.device.type != "meta":
            grid = functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
        else:
            grid = grid.new_empty(1, width, target, target)
        grown = torch.cat([table[:extra], grid.permute(0, 2, 3, 1).reshape(-1, width).to(table.dtype)])
        return grown.reshape(shape)[start:stop]

    return LazyTensor(shape, tensor.dtype, rows, by_rows=False)


def _by_rows(tensor: Lazy) -> bool:
    return getattr(tensor, "by_rows", True)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
