"""Deflated members of a zip archive, unpacked block by block as they are asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial

from weightport.checkpoints.formats.zip_archive import Member
from weightport.checkpoints.forward_run import ForwardRun
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


def inflated(file: SourceFile, member: Member, skip: int, *, big_endian: bool = False) -> ForwardRun:
    """The bytes of a deflated member from byte `skip` on; its end is compared with its size and CRC-32."""
    return ForwardRun(partial(_blocks, file, member, _BLOCK_BYTES), member.size, skip, big_endian)
