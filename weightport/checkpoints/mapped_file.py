"""Bytes of a file as tensors, without reading more than is asked for."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from weightport.errors import CheckpointError

# What an expanded (stride 0) tensor may grow to, if its whole file is smaller: larger ones are bombs, not weights.
_EXPANDED_LIMIT = 1 << 30
_MAX_DIMENSIONS = 64


def require_file(path: Path) -> None:
    """Raises CheckpointError unless `path` is a regular file (or a link to one) with something in it."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise CheckpointError(
                f"{path}: is a link to {os.readlink(path)}, which does not exist. Download the file it stands for."
            ) from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"{path}: expected a checkpoint, found nothing that can be opened ({reason})."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a file, found a folder, pipe or device.")
    if status.st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes). The download or copy did not finish; fetch it again.")


class MappedFile:
    """One file, mapped into memory once. Nothing is read until it is asked for.

    The map is private and copy-on-write: tensors over it can be written to, and the file never changes. Where the
    system will not reserve that much, the map is read-only and tensors are copied out of it.
    """

    def __init__(self, path: Path) -> None:
        require_file(path)
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map, self.writable = self._map_file(file.fileno())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from error

    @staticmethod
    def _map_file(descriptor: int) -> tuple[mmap.mmap, bool]:
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), True
        except OSError:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), False

    def require(self, offset: int, length: int, what: str) -> None:
        """Raises CheckpointError unless the file holds `length` bytes at `offset`, now as when it was opened."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path}: {what} should be {length} bytes at byte {offset}, but the file has {self.size}. "
                "It is truncated or damaged; fetch it again."
            )
        # Touching a page that the file has lost since would kill the process (SIGBUS), so ask first.
        if self._map.size() < offset + length:
            raise CheckpointError(
                f"{self.path}: has shrunk from {self.size} to {self._map.size()} bytes since it was opened. "
                "Something is still writing to it; try again when that is done."
            )

    @property
    def buffer(self) -> mmap.mmap:
        """The whole file, for a reader that finds out on its way how far it has to read."""
        return self._map

    def read(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes at `offset`; `what` they are is for the error message."""
        self.require(offset, length, what)
        return self._map[offset : offset + length]

    def find_last(self, needle: bytes, start: int, stop: int) -> int:
        """Position of the last `needle` that lies within [start, stop), or -1."""
        return self._map.rfind(needle, max(start, 0), stop)

    def elements(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements of `dtype` (little-endian) at byte `offset`: 1-D, over the map itself where that can be."""
        self.require(offset, count * dtype.itemsize, "a tensor")
        if self.writable and offset % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        raw = np.frombuffer(self._map, dtype=np.uint8, count=count * dtype.itemsize, offset=offset)
        return torch.from_numpy(raw.copy()).view(dtype)


class Source(Protocol):
    """A run of bytes somewhere, of which a part can be had as elements."""

    def elements(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements of `dtype` from byte `start` of the run: 1-D, in native byte order."""


@dataclass(frozen=True)
class Span:
    """`nbytes` bytes of a mapped file from `offset` on."""

    file: MappedFile
    offset: int
    nbytes: int
    big_endian: bool = False

    def elements(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        values = self.file.elements(self.offset + start, count, dtype)
        return byte_swapped(values) if self.big_endian else values


def byte_swapped(values: torch.Tensor) -> torch.Tensor:
    """A copy of the 1-D `values` with the bytes of every element reversed (of every part, for complex dtypes)."""
    width = values.dtype.itemsize // (2 if values.dtype.is_complex else 1)
    raw = values.view(torch.uint8).numpy().reshape(-1, width)
    return torch.from_numpy(np.ascontiguousarray(raw[:, ::-1]).reshape(-1)).view(values.dtype)


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie in a run of bytes: element (i, j, …) at `offset` + i·stride[0] + j·stride[1] + ….

    `offset` and `stride` count elements. Raises CheckpointError for what torch cannot represent.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.stride, self.offset)
        if len(self.shape) != len(self.stride) or len(self.shape) > _MAX_DIMENSIONS:
            raise CheckpointError(f"a tensor claims {len(self.shape)} dimensions and {len(self.stride)} strides.")
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise CheckpointError(
                "a tensor's shape, strides and offset must be whole numbers from 0 up, but are "
                f"{shown(self.shape)}, {shown(self.stride)} and {shown(self.offset)}."
            )
        if prod(max(size, 1) for size in self.shape) >= 1 << 60:
            raise CheckpointError(f"a tensor's shape {shown(self.shape)} is larger than torch can hold.")

    @classmethod
    def contiguous(cls, dtype: torch.dtype, shape: tuple[int, ...], *, fortran: bool = False) -> Layout:
        """The layout of an array alone in its bytes, in C order or (first index fastest) in Fortran order."""
        steps = shape if fortran else shape[::-1]
        stride = tuple(prod(steps[:axis]) for axis in range(len(steps)))
        return cls(dtype, shape, stride if fortran else stride[::-1])

    @property
    def count(self) -> int:
        """Elements from the first to the last one that the tensor touches; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    def require_within(self, nbytes: int, file_size: int) -> None:
        """Raises CheckpointError unless the tensor lies in a storage of `nbytes`, of a file of `file_size` bytes."""
        end = (self.offset + self.count) * self.dtype.itemsize if self.count else 0
        if end > nbytes:
            raise CheckpointError(
                f"a tensor of shape {shown(self.shape)}, strides {shown(self.stride)}, offset {self.offset} and dtype "
                f"{self.dtype} ends at byte {end} of a storage of {nbytes} bytes."
            )
        expanded = prod(self.shape) * self.dtype.itemsize
        if expanded > max(file_size, _EXPANDED_LIMIT):
            raise CheckpointError(
                f"a tensor of shape {shown(self.shape)} and strides {shown(self.stride)} would fill {expanded} bytes "
                f"from a file of {file_size}."
            )

    def read(self, source: Source) -> torch.Tensor:
        """The tensor, over as few bytes of `source` as hold it."""
        if not self.count:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = source.elements(self.offset * self.dtype.itemsize, self.count, self.dtype)
        return flat.as_strided(self.shape, self.stride)


def shown(value: object, limit: int = 120) -> str:
    """`value` for an error message: quoted if it is text, control characters escaped, cut at `limit` characters."""
    if isinstance(value, tuple):
        items = [type(item).__name__ if isinstance(item, tuple) else shown(item, 24) for item in value[:16]]
        return "[" + ", ".join(items) + (", …]" if len(value) > 16 else "]")
    if isinstance(value, (str, bytes)):
        return ascii(value[:limit]) + ("…" if len(value) > limit else "")
    text = ascii(value) if isinstance(value, (int, float, type(None))) else type(value).__name__
    return text if len(text) <= limit else text[:limit] + "…"
