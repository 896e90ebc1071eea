"""The directory of a zip archive, read strictly: what it says of a member is checked before a byte of it is used.

Written for archives whose members are read in place, in part and in any order (PKWARE's APPNOTE 6.3.9, sections 4.3 to
4.5). The standard library's zipfile takes archives whose two directories disagree.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from weightport.checkpoints.layout import Checksum, Span
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x0001, 0x0008, 0x0800
_IN_ZIP64 = 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
# No deflate stream holds more than this many times its own length.
_DEFLATE_RATIO = 1032


@dataclass(frozen=True)
class Member:
    """One file of an archive: where its bytes begin, and how many there are, packed and unpacked."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    header: int
    start: int

    @property
    def stored(self) -> bool:
        return self.method == _STORED

    @property
    def deflated(self) -> bool:
        return self.method == _DEFLATED


def read_directory(file: SourceFile) -> dict[str, Member]:
    """The members of the zip archive `file` by name, in the order of its central directory.

    Raises CheckpointError for an archive that is truncated, encrypted or split, names a member twice, lets members
    overlap, or whose local headers contradict its central directory.
    """
    count, start, length = _find_central_directory(file)
    directory = file.read(start, length, "the archive's directory")
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        member, at = _central_entry(file, directory, at)
        if member.name in members:
            raise CheckpointError(f"{file.path}: the archive holds two members named {shown(member.name)}.")
        members[member.name] = member
    if at != length:
        raise CheckpointError(
            f"{file.path}: the archive's directory has {length - at} bytes beyond its {count} entries."
        )
    _require_apart(file, members.values(), start)
    return members


def member_span(file: SourceFile, member: Member, *, skip: int = 0, big_endian: bool = False) -> Span:
    """The bytes of a stored member from byte `skip` on, which are checked against its CRC-32 when they are used."""
    if not member.stored:
        raise CheckpointError(
            f"{file.path}: {shown(member.name)} is compressed (method {member.method}), which torch.save never "
            "does. Another tool packed the file again; get the original, or pack it without compression."
        )
    checksum = Checksum(file, member.name, member.start, member.size, member.crc)
    return Span(file, member.start + skip, member.size - skip, big_endian, checksum)


def read_member(file: SourceFile, member: Member) -> bytes:
    """All bytes of a stored member, checked against its CRC-32."""
    span = member_span(file, member)
    data = file.read(span.offset, span.nbytes, f"the member {shown(member.name)}")
    if span.checksum and not span.checksum.settled:
        span.checksum.settle(zlib.crc32(data))
    return data


def _find_central_directory(file: SourceFile) -> tuple[int, int, int]:
    """Number of entries, first byte and length of the central directory."""
    end = file.find_last(b"PK\5\6", file.size - _END.size - 0xFFFF, file.size)
    if end < 0 or end + _END.size > file.size:
        raise CheckpointError(
            f"{file.path}: is a zip archive without the directory at its end, so it is truncated "
            f"(it has {file.size} bytes). Fetch it again."
        )
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(file.read(end, _END.size, "the zip's end"))
    if end + _END.size + comment != file.size:
        raise CheckpointError(f"{file.path}: has bytes after the end of its zip archive, or is truncated.")
    follows = end
    if 0xFFFF in (count, here) or _IN_ZIP64 in (length, start) or _has_locator(file, end):
        _, disk64, position, disks = _END64_LOCATOR.unpack(
            file.read(end - _END64_LOCATOR.size, _END64_LOCATOR.size, "the zip64 locator")
        )
        record = file.read(position, _END64.size, "the zip64 directory end")
        signature, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack(record)
        if signature != b"PK\6\6" or disk64 or disks > 1:
            raise CheckpointError(f"{file.path}: its zip64 directory end is damaged.")
        follows = position
    if disk or first_disk or here != count:
        raise CheckpointError(f"{file.path}: is one part of a split zip archive. Join the parts first.")
    if start + length != follows:
        raise CheckpointError(
            f"{file.path}: its zip directory should end at byte {follows} and ends at {start + length}: bytes were "
            "added or lost. Fetch it again."
        )
    if count * _CENTRAL.size > length:
        raise CheckpointError(f"{file.path}: its zip directory of {length} bytes cannot hold {count} entries.")
    return count, start, length


def _has_locator(file: SourceFile, end: int) -> bool:
    at = end - _END64_LOCATOR.size
    return at >= 0 and file.read(at, 4, "the zip64 locator") == b"PK\6\7"


def _central_entry(file: SourceFile, directory: bytes, at: int) -> tuple[Member, int]:
    if at + _CENTRAL.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
        raise CheckpointError(f"{file.path}: its zip directory is damaged at entry byte {at}.")
    fields = _CENTRAL.unpack_from(directory, at)
    _, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, _, header = fields
    at += _CENTRAL.size
    raw_name, extra = directory[at : at + name_length], directory[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment
    if at > len(directory):
        raise CheckpointError(f"{file.path}: its zip directory ends inside an entry.")
    name = _decoded_name(file, raw_name, flags)
    size, packed, header = _zip64_values(file, name, extra, (size, packed, header))
    if flags & _ENCRYPTED:
        raise CheckpointError(f"{file.path}: {shown(name)} is encrypted. Decrypt the archive first.")
    if method == _STORED and packed != size:
        raise CheckpointError(f"{file.path}: {shown(name)} is stored, yet {packed} bytes are said to make {size}.")
    if method == _DEFLATED and size > packed * _DEFLATE_RATIO + 1024:
        raise CheckpointError(f"{file.path}: {shown(name)} claims {size} bytes from {packed}, more than deflate can.")
    if disk:
        raise CheckpointError(f"{file.path}: is one part of a split zip archive. Join the parts first.")
    start = _data_start(file, name, raw_name, (method, packed, size), header)
    return Member(name, method, crc, packed, size, header, start), at


def _decoded_name(file: SourceFile, raw: bytes, flags: int) -> str:
    try:
        return raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file.path}: a member's name is not UTF-8: {shown(raw)}.") from error


def _zip64_values(file: SourceFile, name: str, extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """`values` with each one that says "see zip64" replaced, in order, from the zip64 extra field."""
    wanted = sum(value == _IN_ZIP64 for value in values)
    if not wanted:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and length >= 8 * wanted and at + 4 + 8 * wanted <= len(extra):
            found = iter(struct.unpack_from(f"<{wanted}Q", extra, at + 4))
            return tuple(next(found) if value == _IN_ZIP64 else value for value in values)
        at += 4 + length
    raise CheckpointError(f"{file.path}: {shown(name)} has no zip64 sizes where its entry refers to them.")


def _data_start(file: SourceFile, name: str, raw_name: bytes, central: tuple[int, int, int], header: int) -> int:
    """First byte of the member's data, from its local header, which must agree with the central directory's entry."""
    local = file.read(header, _LOCAL.size, f"the header of {shown(name)}")
    signature, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL.unpack(local)
    start = header + _LOCAL.size + name_length + extra_length
    rest = file.read(header + _LOCAL.size, name_length + extra_length, f"the header of {shown(name)}")
    if signature == b"PK\3\4" and not flags & _SIZES_FOLLOW:
        size, packed = _zip64_values(file, name, rest[name_length:], (size, packed))
    else:
        # The sizes come after the data then, or are kept as zeros here; the central directory is what there is.
        _, packed, size = central
    if signature != b"PK\3\4" or rest[:name_length] != raw_name or (method, packed, size) != central:
        raise CheckpointError(
            f"{file.path}: the archive's directory and the header of {shown(name)} at byte {header} disagree. "
            "The file is damaged or was tampered with; fetch it again."
        )
    if flags & _ENCRYPTED:
        raise CheckpointError(f"{file.path}: {shown(name)} is encrypted. Decrypt the archive first.")
    file.require(start, packed, f"the member {shown(name)}")
    return start


def _require_apart(file: SourceFile, members: Iterable[Member], directory_start: int) -> None:
    ordered = sorted(members, key=lambda member: member.header)
    for member, follows in zip(ordered, [*(later.header for later in ordered[1:]), directory_start]):
        if member.start + member.packed > follows:
            raise CheckpointError(f"{file.path}: {shown(member.name)} overlaps what follows it in the archive.")
