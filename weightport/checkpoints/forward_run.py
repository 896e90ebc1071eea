"""Runs of bytes that can only be had from their beginning on, because they are compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weightport.checkpoints.layout import byte_swapped

if TYPE_CHECKING:
    import torch


@dataclass
class _Unpacking:
    """A run that is being unpacked: what comes next (`rest` first), and how many bytes have come."""

    blocks: Iterator[bytes]
    at: int = 0
    rest: bytes = b""

    def put_back(self, rest: bytes) -> None:
        self.rest, self.at = rest, self.at - len(rest)

    def __iter__(self) -> Iterator[bytes]:
        if self.rest:
            block, self.rest = self.rest, b""
            self.at += len(block)
            yield block
        for block in self.blocks:
            self.at += len(block)
            yield block


@dataclass(frozen=True)
class ForwardRun:
    """The bytes of a compressed run from byte `skip` on, as a Source.

    `unpack()` gives all `size` bytes of the run in blocks, from the beginning, and raises CheckpointError at the end
    where they are damaged. Each reading unpacks the whole run, so that its end is reached; with `ordered` (see
    Source.in_order) one reading goes on where the one before ended.
    """

    unpack: Callable[[], Iterator[bytes]]
    size: int
    skip: int = 0
    big_endian: bool = False
    ordered: bool = False
    _paused: list[_Unpacking] = field(default_factory=list, repr=False, compare=False)

    def in_order(self) -> ForwardRun:
        return replace(self, ordered=True)

    def pieces(self, start: int, count: int, dtype: torch.dtype, nbytes: int) -> Iterator[torch.Tensor]:
        import torch

        wanted = count * dtype.itemsize
        step = max(nbytes // dtype.itemsize, 1) * dtype.itemsize
        values, filled = torch.empty(min(step, wanted), dtype=torch.uint8), 0
        unpacking = self._from(self.skip + start)
        before = self.skip + start - unpacking.at
        last = self.skip + start + wanted == self.size
        for block in unpacking:
            begin = min(before, len(block))
            before -= begin
            while begin < len(block) and wanted:
                part = block[begin : begin + len(values) - filled]
                values[filled : filled + len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                begin, filled, wanted = begin + len(part), filled + len(part), wanted - len(part)
                if filled == len(values):
                    yield self._elements(values, dtype)
                    values, filled = torch.empty(min(step, wanted), dtype=torch.uint8), 0
            if self.ordered and not wanted and not last:
                unpacking.put_back(block[begin:])
                self._paused[:] = [unpacking]
                return

    def _from(self, offset: int) -> _Unpacking:
        """The run from its beginning, or from where the reading before ended, if that is not behind `offset`."""
        found = self._paused.pop() if self.ordered and self._paused else None
        return found if found is not None and found.at <= offset else _Unpacking(self.unpack())

    def _elements(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return byte_swapped(values.view(dtype)) if self.big_endian else values.view(dtype)
