"""Tensors that are computed as they are written: shape and dtype at once, values in blocks of rows on demand.

Operations take lazy tensors to lazy tensors, so that a plan knows every shape before a byte is read, and a stack of a
model's layers is written (or taken apart) one layer's bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from weightport.checkpoints.layout import raw_bytes
from weightport.checkpoints.types import TensorRef

CHUNK_BYTES = 16 << 20
"""About how many bytes `blocks` yields at a time."""


class Lazy(Protocol):
    """What operations work on: a checkpoint's TensorRef, or what an operation makes of some."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> torch.Tensor:
        """The whole tensor, of `shape` and `dtype`."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of axis 0, at the cost of these rows where the layout allows."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that an operation makes.

    `compute(start, stop)` gives rows of axis 0 (a scalar has no rows: (0, 1) gives it whole). `by_rows` False: any row
    needs all that the tensor is made of, so it is computed once for all blocks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[int, int], torch.Tensor]
    by_rows: bool = True

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        return self.compute(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of axis 0."""
        return self.compute(start, stop)


def in_memory(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is there already (a weight, a gradient, a meta tensor)."""
    return LazyTensor(
        tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop] if tensor.ndim else tensor
    )


def blocks(tensor: Lazy, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
    """The values in row-major order: contiguous tensors of about CHUNK_BYTES in `dtype` (None: the tensor's own).

    Views where nothing changes. Memory is bounded by one block of rows; where rows are not independent, by the tensor.
    """
    dtype = dtype or tensor.dtype
    if isinstance(tensor, TensorRef):
        for piece in tensor.pieces(CHUNK_BYTES):
            yield piece.to(dtype)
        return
    if not tensor.shape or not prod(tensor.shape) or not getattr(tensor, "by_rows", True):
        yield from chunks(tensor.read(), dtype)
        return
    step = max(1, CHUNK_BYTES // max(1, prod(tensor.shape[1:]) * dtype.itemsize))
    for start in range(0, tensor.shape[0], step):
        yield from chunks(tensor.rows(start, min(start + step, tensor.shape[0])), dtype)


def chunks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """`tensor` in `dtype`, contiguous, in row blocks of about CHUNK_BYTES: views where nothing changes."""
    if tensor.ndim == 0 or tensor.numel() == 0 or tensor.is_contiguous():
        flat = tensor.reshape(-1)
        step = max(1, CHUNK_BYTES // dtype.itemsize)
        for start in range(0, flat.numel(), step):
            yield flat[start : start + step].to(dtype)
        return
    row = max(1, tensor[0].numel() * dtype.itemsize)
    step = max(1, CHUNK_BYTES // row)
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step].to(dtype).contiguous()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (NaN equals itself), compared chunk by chunk."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = (
        zip(chunks(a, a.dtype), chunks(b, b.dtype))
        if a.is_contiguous() == b.is_contiguous()
        else ((a.contiguous(), b.contiguous()),)
    )
    return all(torch.equal(raw_bytes(x), raw_bytes(y)) for x, y in pairs)


def same_stored_bits(a: TensorRef, b: TensorRef) -> bool:
    """As `same_bits`, of stored tensors: never all of their values in memory."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(same_bits(x, y) for x, y in zip(a.pieces(CHUNK_BYTES), b.pieces(CHUNK_BYTES)))
