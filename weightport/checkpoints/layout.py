"""Tensors over runs of bytes: where their elements lie, and reading no more than holds them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from typing import TYPE_CHECKING, Protocol

import numpy as np

from weightport.checkpoints.dtypes import ElementType
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# What an expanded (stride 0) tensor may grow to, if its whole file is smaller: larger ones are bombs, not weights.
_EXPANDED_LIMIT = 1 << 30
_MAX_DIMENSIONS = 64
_BLOCK_BYTES = 8 << 20


class Source(Protocol):
    """A run of bytes somewhere, of which a part can be had as elements."""

    def pieces(self, start: int, count: int, dtype: torch.dtype, nbytes: int) -> Iterator[torch.Tensor]:
        """`count` elements of `dtype` from byte `start` of the run: 1-D, in native byte order, at most `nbytes` bytes
        (but one element at least) at a time. Every piece has memory of its own."""

    def in_order(self) -> Source:
        """The same run for a reader that takes all of it, part after part from the first to the last: each byte is
        read once then, and what is checked over the whole run is checked when the last part is read."""


class Checksum:
    """The CRC-32 of `nbytes` bytes of a file from `start` on, compared the first time that any of them is used.

    An `expected` of 0 says that whoever wrote the file computed none (torch.serialization.set_crc32_options(False)).
    """

    def __init__(self, file: SourceFile, name: str, start: int, nbytes: int, expected: int) -> None:
        self.file = file
        self.name = name
        self.start = start
        self.nbytes = nbytes
        self.expected = expected
        self.settled = not expected
        # Where a reader that takes part after part goes on, and the CRC-32 of what it has had.
        self._next, self._crc = start, 0

    def before(self, offset: int, nbytes: int, *, first: int | None = None) -> int | None:
        """The CRC-32 of what stands before `offset`, for whoever is about to read the `nbytes` bytes from there to the
        end and hands the result to `after`; None where nothing is left to check.

        Who reads less than that has all of it checked now: one pass more over these bytes, once. Not so a reader that
        takes part after part from the byte `first` on: the parts before were read already and those behind will be.
        """
        if self.settled:
            return None
        if (offset, nbytes) == (self.start, self.nbytes):
            return 0
        if first is not None and offset == self._next:
            return self._crc
        if offset == first:
            return zlib.crc32(self.file.read(self.start, first - self.start, f"the member {shown(self.name)}"))
        until = offset if offset + nbytes == self.start + self.nbytes else self.start + self.nbytes
        crc = 0
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, until - self.start)))
        for at in range(self.start, until, _BLOCK_BYTES):
            block = buffer[: until - at]
            self.file.read_into(block, at, f"the member {shown(self.name)}")
            crc = zlib.crc32(block, crc)
        if until == offset and nbytes:
            return crc
        self.settle(crc)
        return None

    def after(self, end: int, crc: int) -> None:
        """`crc` is that of everything before the byte `end`. Raises CheckpointError as `settle` does."""
        if end == self.start + self.nbytes:
            self.settle(crc)
        self._next, self._crc = end, crc

    def settle(self, crc: int) -> None:
        """Raises CheckpointError unless `crc` is what the archive says."""
        if crc != self.expected:
            raise CheckpointError(
                f"{self.file.path}: {shown(self.name)} is damaged: its CRC-32 should be {self.expected:08x} and is "
                f"{crc:08x}. The file was not copied whole, or its disk is failing; fetch it again."
            )
        self.settled = True


@dataclass(frozen=True)
class Span:
    """`nbytes` bytes of a file from `offset` on, part of what `checksum` covers where there is one. `ordered`: see
    Source.in_order."""

    file: SourceFile
    offset: int
    nbytes: int
    big_endian: bool = False
    checksum: Checksum | None = None
    ordered: bool = False

    def in_order(self) -> Span:
        return replace(self, ordered=True)

    @property
    def is_plain(self) -> bool:
        """Whether the bytes are elements as they stand, and nothing is checked over all of them."""
        return not self.big_endian and self.checksum is None

    def fill(self, values: torch.Tensor, start: int) -> None:
        """Read into the contiguous `values` what stands from byte `start` of the run on; for plain runs only."""
        assert self.is_plain
        self.file.read_into(memoryview(raw_bytes(values).numpy()), self.offset + start, "a tensor")  # type: ignore[arg-type]

    def pieces(self, start: int, count: int, dtype: torch.dtype, nbytes: int) -> Iterator[torch.Tensor]:
        import torch

        offset, end = self.offset + start, self.offset + start + count * dtype.itemsize
        self.file.require(offset, end - offset, "a tensor")
        first = self.offset if self.ordered else None
        crc = self.checksum.before(offset, end - offset, first=first) if self.checksum else None
        step = max(nbytes // dtype.itemsize, 1) * dtype.itemsize
        for at in range(offset, end, step):
            values = torch.empty(min(step, end - at) // dtype.itemsize, dtype=dtype)
            raw = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
            self.file.read_into(raw, at, "a tensor")
            if self.checksum and crc is not None:
                crc = zlib.crc32(raw, crc)
                if at + len(raw) == end:
                    self.checksum.after(end, crc)
            yield byte_swapped(values) if self.big_endian else values


def raw_bytes(values: torch.Tensor) -> torch.Tensor:
    """The bytes of `values` in row-major order: uint8, 1-D, sharing memory where the elements lie in order."""
    import torch

    flat = values.detach().reshape(-1)
    if flat.numel() == 1:
        # torch calls a single element contiguous whatever its stride, and then refuses to see its bytes.
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def byte_swapped(values: torch.Tensor) -> torch.Tensor:
    """A copy of the 1-D `values` with the bytes of every element reversed (of every part, for complex dtypes)."""
    import torch

    width = values.dtype.itemsize // (2 if values.dtype.is_complex else 1)
    raw = values.view(torch.uint8).numpy().reshape(-1, width)
    return torch.from_numpy(np.ascontiguousarray(raw[:, ::-1]).reshape(-1)).view(values.dtype)


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie in a run of bytes: element (i, j, …) at `offset` + i·stride[0] + j·stride[1] + ….

    `offset` and `stride` count elements. Raises CheckpointError for what torch cannot represent.
    """

    element: ElementType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride) or len(self.shape) > _MAX_DIMENSIONS:
            raise CheckpointError(f"a tensor claims {len(self.shape)} dimensions and {len(self.stride)} strides.")
        numbers = (*self.shape, *self.stride, self.offset)
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= 1 << 62:
            raise CheckpointError(
                "a tensor's shape, strides and offset must be whole numbers from 0 up, but are "
                f"{shown(self.shape)}, {shown(self.stride)} and {shown(self.offset)}."
            )
        if prod(filter(None, self.shape)) >= 1 << 60:
            raise CheckpointError(f"a tensor's shape {shown(self.shape)} is larger than torch can hold.")

    @classmethod
    def contiguous(cls, element: ElementType, shape: tuple[int, ...], *, fortran: bool = False) -> Layout:
        """The layout of an array alone in its bytes, in C order or (first index fastest) in Fortran order."""
        if len(shape) > _MAX_DIMENSIONS:
            raise CheckpointError(f"a tensor claims {len(shape)} dimensions; at most {_MAX_DIMENSIONS} are.")
        steps = shape if fortran else shape[::-1]
        stride = tuple(accumulate(steps, mul, initial=1))[:-1]
        return cls(element, shape, stride if fortran else stride[::-1])

    @property
    def count(self) -> int:
        """Elements from the first to the last one that the tensor touches; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    def require_within(self, nbytes: int, file_size: int) -> None:
        """Raises CheckpointError unless the tensor lies in a storage of `nbytes`, of a file of `file_size` bytes."""
        end = (self.offset + self.count) * self.element.itemsize if self.count else 0
        if end > nbytes:
            raise CheckpointError(
                f"a tensor of shape {shown(self.shape)}, strides {shown(self.stride)}, offset {self.offset} and dtype "
                f"{self.element} ends at byte {end} of a storage of {nbytes} bytes."
            )
        expanded = prod(self.shape) * self.element.itemsize
        if expanded > max(file_size, _EXPANDED_LIMIT):
            raise CheckpointError(
                f"a tensor of shape {shown(self.shape)} and strides {shown(self.stride)} would fill {expanded} bytes "
                f"from a file of {file_size}."
            )

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements stand in the run one after the other, the last index fastest."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride)):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def read(self, source: Source) -> torch.Tensor:
        """The tensor, in memory of its own, over as few bytes of `source` as hold it."""
        import torch

        if not self.count:
            return torch.empty(self.shape, dtype=self.element.dtype)
        start, nbytes = self.offset * self.element.itemsize, self.count * self.element.itemsize
        (flat,) = source.pieces(start, self.count, self.element.dtype, nbytes)
        return flat.as_strided(self.shape, self.stride)

    def pieces(self, source: Source, nbytes: int) -> Iterator[torch.Tensor]:
        """The tensor's elements in row-major order: 1-D, at most `nbytes` bytes at a time."""
        if self.count and self.is_contiguous:
            yield from source.pieces(self.offset * self.element.itemsize, self.count, self.element.dtype, nbytes)
        elif self.count:
            yield from self.read(source).reshape(-1).split(max(nbytes // self.element.itemsize, 1))


@dataclass(frozen=True)
class StoredTensor:
    """What reads one tensor of a file: called, it gives all of it."""

    layout: Layout
    source: Source

    def __call__(self) -> torch.Tensor:
        return self.layout.read(self.source)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of axis 0, over as few bytes as hold them."""
        whole = self.layout
        shape = (max(stop - start, 0), *whole.shape[1:])
        return Layout(whole.element, shape, whole.stride, whole.offset + start * whole.stride[0]).read(self.source)

    def part(self, place: int) -> StoredTensor:
        """Entry `place` of axis 0, for a reader that takes all entries in their order."""
        whole = self.layout
        own = Layout(whole.element, whole.shape[1:], whole.stride[1:], whole.offset + place * whole.stride[0])
        # Entries of Fortran order lie between each other.
        return StoredTensor(own, self.source.in_order() if whole.is_contiguous else self.source)

    def pieces(self, nbytes: int) -> Iterator[torch.Tensor]:
        """The tensor's elements in row-major order: 1-D, at most `nbytes` bytes at a time."""
        return self.layout.pieces(self.source, nbytes)
