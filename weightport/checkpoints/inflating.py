"""Deflated members of a zip archive, unpacked block by block as they are asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from weightport.checkpoints.formats.zip_archive import Member
from weightport.checkpoints.layout import byte_swapped
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError

_BLOCK_BYTES = 1 << 20
_FIRST_BYTES = 1 << 14


def inflate(file: SourceFile, member: Member, limit: int | None = None) -> bytes:
    """The bytes of a deflated member: all of them, checked against its size and CRC-32, or the first `limit`."""
    found = bytearray()
    for block in _blocks(file, member, _FIRST_BYTES if limit is not None else _BLOCK_BYTES):
        found += block
        if limit is not None and len(found) >= limit:
            break
    return bytes(found[:limit])


def _blocks(file: SourceFile, member: Member, packed_bytes: int) -> Iterator[bytes]:
    """What the member unpacks to, in order; its size and CRC-32 are compared with the last block."""
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    size = crc = at = 0
    rest = b""
    while not engine.eof:
        if not rest and at < member.packed:
            length = min(packed_bytes, member.packed - at)
            rest = file.read(member.start + at, length, f"the member {shown(member.name)}")
            at += length
        try:
            block = engine.decompress(rest, _BLOCK_BYTES)
        except zlib.error as error:
            raise CheckpointError(f"{file.path}: {shown(member.name)} cannot be decompressed ({error}).") from error
        if not block and not rest:
            break
        rest = engine.unconsumed_tail
        size, crc = size + len(block), zlib.crc32(block, crc)
        if size > member.size:
            break
        yield block
    if size != member.size or crc != member.crc:
        raise CheckpointError(
            f"{file.path}: {shown(member.name)} unpacks to {'more' if size > member.size else size} bytes that do not "
            f"match its size ({member.size}) and checksum. The file is damaged; fetch it again."
        )


@dataclass
class _Unpacking:
    """A member that is being unpacked: what comes next (`rest` first), and how many bytes have come."""

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
class Inflated:
    """The bytes of a deflated member from byte `skip` on. deflate has no index: each reading unpacks the member, and
    its end is compared with its size and CRC-32. With `unpacking` (see Source.in_order) one reading goes on where the
    one before ended."""

    file: SourceFile
    member: Member
    skip: int
    big_endian: bool = False
    unpacking: list[_Unpacking] | None = None
    _shared: list[_Unpacking] = field(default_factory=list, repr=False, compare=False)

    def in_order(self) -> Inflated:
        return replace(self, unpacking=self._shared)

    def pieces(self, start: int, count: int, dtype: torch.dtype, nbytes: int) -> Iterator[torch.Tensor]:
        wanted = count * dtype.itemsize
        step = max(nbytes // dtype.itemsize, 1) * dtype.itemsize
        values, filled = torch.empty(min(step, wanted), dtype=torch.uint8), 0
        unpacking = self._from(self.skip + start)
        before = self.skip + start - unpacking.at
        last = self.skip + start + wanted == self.member.size
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
            if self.unpacking is not None and not wanted and not last:
                unpacking.put_back(block[begin:])
                self.unpacking[:] = [unpacking]
                return

    def _from(self, offset: int) -> _Unpacking:
        """The member's bytes from its beginning, or from where the reading before ended, if that is not behind
        `offset`."""
        found = self.unpacking.pop() if self.unpacking else None
        if found is not None and found.at <= offset:
            return found
        return _Unpacking(_blocks(self.file, self.member, _BLOCK_BYTES))

    def _elements(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return byte_swapped(values.view(dtype)) if self.big_endian else values.view(dtype)
