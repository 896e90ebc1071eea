"""Operations that add, leave out or compute values; those that `backward` cannot restore say so (`lossy`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from weightport.checkpoints.lazy_tensors import Lazy, LazyTensor
from weightport.converters.low_rank_pair import LowRankPair
from weightport.converters.operations.layout import narrowed
from weightport.converters.operations.operation import Operation, applied, dtype_name, has_own_rows
from weightport.errors import AdapterError


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
        return [narrowed(target, 0, 0, target.shape[0] - self.count) for target in targets]

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
        return [narrowed(source, 0, 0, source.shape[0] - self.count) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_padded(target, self.count, self.fill) for target in targets]


@dataclass(frozen=True)
class Cast(Operation):
    """Another dtype. Lossy unless `target` holds every value of `source`."""

    source: torch.dtype
    target: torch.dtype

    @property
    def name(self) -> str:
        return f"cast {dtype_name(self.source)} → {dtype_name(self.target)}"

    @property
    def lossy(self) -> str | None:
        exact = torch.promote_types(self.source, self.target) == self.target
        return None if exact else f"digits beyond {dtype_name(self.target)}"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_cast(source, self.source, self.target) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_cast(target, self.target, self.source) for target in targets]


@dataclass(frozen=True)
class Resize(Operation):
    """A table of positions [1 or none, extra + side², width] for another grid, by bicubic interpolation.

    `extra` rows at the start (class tokens) stay as they are. `align_corners` as torch's interpolation has it.
    `precision`: computed in float32 and given in the table's dtype ("rounded"), in float32 ("float32"), or computed
    in the table's dtype ("own"). Backward interpolates the other way, which does not give the same values: an export
    says so.
    """

    source: int
    target: int
    extra: int = 0
    align_corners: bool = False
    precision: Literal["rounded", "float32", "own"] = "rounded"

    @property
    def name(self) -> str:
        return f"interpolate positions {self.source}² → {self.target}²"

    @property
    def lossy(self) -> str | None:
        return None if self.source == self.target else f"the table of {self.source}² positions (interpolated back)"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_interpolated(source, self, self.source, self.target) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return [_interpolated(target, self, self.target, self.source) for target in targets]


@dataclass(frozen=True)
class Rounded(Operation):
    """The values that are left in a narrower floating-point dtype, written in it; backward gives these."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"round to {dtype_name(self.dtype)}"

    @property
    def lossy(self) -> str | None:
        return f"digits beyond {dtype_name(self.dtype)}"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return [_cast(source, source.dtype, self.dtype) for source in sources]

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return list(targets)


def _padded(tensor: Lazy, count: int, value: float = 0.0) -> LazyTensor:
    own, rest = tensor.shape[0], tensor.shape[1:]

    def rows(start: int, stop: int) -> torch.Tensor:
        added = max(stop - max(start, own), 0)
        kept = tensor.rows(min(start, own), min(stop, own))
        return torch.cat([kept, kept.new_full((added, *rest), value)]) if added else kept

    return LazyTensor((own + count, *rest), tensor.dtype, rows, has_own_rows(tensor))


def _cast(tensor: Lazy, source: torch.dtype, target: torch.dtype) -> LazyTensor:
    if tensor.dtype != source:
        raise ValueError(f"expected {dtype_name(source)}, found {dtype_name(tensor.dtype)}")
    return LazyTensor(
        tensor.shape, target, lambda start, stop: tensor.rows(start, stop).to(target), has_own_rows(tensor)
    )


def _interpolated(tensor: Lazy, how: Resize, source: int, target: int) -> LazyTensor:
    if source == target:
        return LazyTensor(tensor.shape, tensor.dtype, tensor.rows)
    lead, width, extra = tensor.shape[:-2], tensor.shape[-1], how.extra
    if tensor.shape[-2] != extra + source**2:
        raise ValueError(f"{tensor.shape} is no table of {extra} + {source}² positions")
    shape = (*lead, extra + target**2, width)
    dtype = torch.float32 if how.precision == "float32" else tensor.dtype

    def rows(start: int, stop: int) -> torch.Tensor:
        table = tensor.read().reshape(-1, width)
        grid = table[extra:].reshape(1, source, source, width).permute(0, 3, 1, 2)
        grid = grid if how.precision == "own" else grid.float()
        if grid.device.type != "meta":
            grid = functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=how.align_corners)
        else:
            grid = grid.new_empty(1, width, target, target)
        grown = torch.cat([table[:extra].to(dtype), grid.permute(0, 2, 3, 1).reshape(-1, width).to(dtype)])
        return grown.reshape(shape)[start:stop]

    return LazyTensor(shape, dtype, rows, by_rows=False)
