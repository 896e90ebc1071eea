"""Operations on the layout of tensors: axes in another order, pieces of one tensor, another shape for its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightport.checkpoints.lazy_tensors import Lazy, LazyTensor
from weightport.converters.low_rank_pair import LowRankPair
from weightport.converters.operations.operation import Operation, Shape, applied, dtype_name, has_own_rows
from weightport.errors import AdapterError


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
        return [narrowed(tensor, self.dim, start, size) for start, size in zip(starts, sizes)]

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
class JoinAroundZeros(Operation):
    """Two equal tensors with as many zeros between them, along axis 0: the bias of a joined query, key and value
    matrix of which only query and value have one. Backward leaves the middle out, whatever it holds: a constant added
    to all keys changes no attention."""

    @property
    def name(self) -> str:
        return "concatenate, zeros between"

    @property
    def sources(self) -> int:
        return 2

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        first, last = sources
        if first.shape != last.shape:
            raise ValueError(f"{first.shape} and {last.shape} differ")
        zeros = LazyTensor(
            first.shape,
            first.dtype,
            lambda start, stop: torch.zeros((stop - start, *first.shape[1:]), dtype=first.dtype),
        )
        return [_joined([first, zeros, last], 0)]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        first, _, last = Split(3).forward(targets)
        return [first, last]


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


def _permuted(tensor: Lazy, dims: Shape) -> LazyTensor:
    if len(dims) != len(tensor.shape):
        raise ValueError(f"{tensor.shape} has not the {len(dims)} axes of {dims}")
    shape = tuple(tensor.shape[axis] for axis in dims)
    if dims[:1] == (0,):
        return LazyTensor(
            shape, tensor.dtype, lambda start, stop: tensor.rows(start, stop).permute(dims), has_own_rows(tensor)
        )
    return LazyTensor(shape, tensor.dtype, lambda start, stop: tensor.read().permute(dims)[start:stop], by_rows=False)


def narrowed(tensor: Lazy, dim: int, start: int, size: int) -> LazyTensor:
    """`size` places of the axis `dim` from `start` on. Raises ValueError for a size below zero."""
    if size < 0:
        raise ValueError(f"axis {dim} of {tensor.shape} is too short")
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    if dim == 0:
        return LazyTensor(shape, tensor.dtype, lambda a, b: tensor.rows(start + a, start + b), has_own_rows(tensor))
    return LazyTensor(
        shape, tensor.dtype, lambda a, b: tensor.rows(a, b).narrow(dim, start, size), has_own_rows(tensor)
    )


def _joined(tensors: Sequence[Lazy], dim: int) -> LazyTensor:
    first = tensors[0]
    rest = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
    if len(rest) > 1 or len({tensor.dtype for tensor in tensors}) > 1:
        found = ", ".join(f"{tensor.shape} {dtype_name(tensor.dtype)}" for tensor in tensors)
        raise ValueError(f"tensors of {found} do not join along axis {dim}")
    shape = (*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :])
    by_rows = all(map(has_own_rows, tensors))
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
            has_own_rows(tensor),
        )

    def rows(start: int, stop: int) -> torch.Tensor:
        whole = tensor.read().reshape(shape)
        return whole[start:stop] if shape else whole

    return LazyTensor(shape, tensor.dtype, rows, by_rows=False)
