"""torch.save's two formats: the zip archive (since torch 1.6) and the stream of pickles before it."""

from __future__ import annotations

import re
import struct
from typing import Any

from weightport.checkpoints.dtypes import QUANTIZED_STORAGES, TORCH_STORAGES, ElementType
from weightport.checkpoints.formats.zip_archive import Member, member_span, read_directory, read_member
from weightport.checkpoints.layout import Span
from weightport.checkpoints.naming import name_tensors
from weightport.checkpoints.pickle.reader import unpickle
from weightport.checkpoints.pickle.records import Symbol
from weightport.checkpoints.pickle.torch_tensors import Storage, StorageView
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.checkpoints.types import Checkpoint
from weightport.errors import CheckpointError, UnsafeCheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGE_NAME = re.compile(r"torch\.(?:cuda\.|storage\.)?_?(\w+Storage)")


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins with `start` is of torch's older format: its first pickle is the magic number."""
    return start[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in start[:32]


def open_zip(file: SourceFile, members: dict[str, Member] | None = None) -> Checkpoint:
    """The checkpoint in a torch zip archive. Only its directory and its pickle are read."""
    members = read_directory(file) if members is None else members
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file.path}: a torch archive has one data.pkl, this one has {len(pickles)} ({shown(tuple(pickles))})."
        )
    root = pickles[0].removesuffix("data.pkl")
    _refuse_programs(file, members, root)
    big_endian = _is_big_endian(file, members.get(f"{root}byteorder"))
    storages: dict[str, Storage] = {}

    def resolve(key: Any) -> Any:
        if _is_module(key):
            return key[1]
        kind, name, count, _ = _storage_id(key)
        if name not in storages:
            member = members.get(f"{root}data/{name}")
            if member is None:
                raise CheckpointError(f"refers to the storage {shown(name)}, which the archive does not hold.")
            span = member_span(file, member, big_endian=big_endian)
            storages[name] = Storage(file.path, name, kind, count, file.size, span)
            if storages[name].nbytes != member.size:
                raise CheckpointError(
                    f"claims {storages[name].nbytes} bytes for the storage {shown(name)}, which has {member.size}."
                )
        return _same(storages[name], kind, count)

    document, _ = unpickle(read_member(file, members[pickles[0]]), f"{file.path}: its data.pkl", resolve)
    return _checkpoint(file, "torch-zip", document)


def open_legacy(file: SourceFile) -> Checkpoint:
    """The checkpoint in torch's older format: five pickles, then each storage's length and bytes (little-endian)."""
    where = f"{file.path}: in torch's format of before 1.6, its pickle"
    magic, at = unpickle(file, where)
    protocol, at = unpickle(file, where, start=at)
    if magic != LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise CheckpointError(f"{file.path}: is of torch's format {shown(protocol)}; known is {_LEGACY_PROTOCOL}.")
    _, at = unpickle(file, where, start=at)
    storages: dict[str, Storage] = {}

    def resolve(key: Any) -> Any:
        if _is_module(key):
            return key[1]
        kind, name, count, view = _storage_id(key)
        storage = storages.setdefault(name, Storage(file.path, name, kind, count, file.size))
        return _viewed(_same(storage, kind, count), view)

    document, at = unpickle(file, where, resolve, start=at)
    keys, at = unpickle(file, where, start=at)
    _locate_storages(file, storages, keys, at)
    return _checkpoint(file, "torch-legacy", document)


def _locate_storages(file: SourceFile, storages: dict[str, Storage], keys: Any, at: int) -> None:
    """Gives every storage its bytes: the file holds them in the order of `keys`, each after its count of elements."""
    named = isinstance(keys, list) and all(isinstance(key, (str, int)) for key in keys)
    if not named or set(map(str, keys)) != set(storages) or len(keys) != len(storages):
        raise CheckpointError(f"{file.path}: its list of storages does not match the {len(storages)} that it uses.")
    for key in keys:
        storage = storages[str(key)]
        (count,) = struct.unpack("<q", file.read(at, 8, f"the length of storage {shown(key)}"))
        if count != storage.count:
            raise CheckpointError(
                f"{file.path}: storage {shown(key)} has {count} elements where {storage.count} were announced."
            )
        file.require(at + 8, storage.nbytes, f"storage {shown(key)}")
        storage.source = Span(file, at + 8, storage.nbytes)
        at += 8 + storage.nbytes


def _checkpoint(file: SourceFile, form: str, document: Any) -> Checkpoint:
    try:
        return Checkpoint(file.path, form, (file.path,), name_tensors(document), document, {file.path: file.state})
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def _is_module(key: Any) -> bool:
    """Whether a persistent id is that of a class with its source code, which a pickled module carries along."""
    return isinstance(key, tuple) and key[:1] == ("module",) and len(key) > 1


def _storage_id(key: Any) -> tuple[ElementType | None, str, int, Any]:
    """Element type (None: bytes), name, number of elements and view of a persistent id."""
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
        raise CheckpointError(f"refers to {shown(key)}, which is no storage.")
    _, kind, name, _, count, *view = key
    if not isinstance(name, (str, int)) or type(count) is not int or not 0 <= count < 1 << 62:
        raise CheckpointError(f"refers to a storage {shown(name)} of {shown(count)} elements.")
    return _element_type(kind), str(name), count, view[0] if view else None


def _element_type(kind: Any) -> ElementType | None:
    found = _STORAGE_NAME.fullmatch(kind.type_name) if isinstance(kind, Symbol) else None
    name = found[1] if found else ""
    if name in QUANTIZED_STORAGES:
        raise CheckpointError(
            f"holds quantized values ({kind.type_name}). Get the checkpoint as it was before quantization."
        )
    if name not in TORCH_STORAGES and name != "UntypedStorage":
        named = kind.type_name if isinstance(kind, Symbol) else kind
        raise CheckpointError(f"refers to a storage of the unknown type {shown(named)}.")
    return TORCH_STORAGES.get(name)


def _same(storage: Storage, kind: ElementType | None, count: int) -> Storage:
    if (storage.element, storage.count) != (kind, count):
        raise CheckpointError(
            f"describes the storage {shown(storage.key)} twice: as {storage.count} × {storage.element} and as "
            f"{count} × {kind}."
        )
    return storage


def _viewed(storage: Storage, view: Any) -> Storage | StorageView:
    if view is None:
        return storage
    if not isinstance(view, tuple) or len(view) != 3 or not all(type(number) is int for number in view[1:]):
        raise CheckpointError(f"refers to a part of storage {shown(storage.key)} by {shown(view)}.")
    _, offset, count = view
    if offset < 0 or count < 0 or offset + count > storage.count:
        raise CheckpointError(f"refers to elements {offset} to {offset + count} of {storage.count}.")
    return StorageView(storage, offset, count)


def _is_big_endian(file: SourceFile, member: Member | None) -> bool:
    if member is None:
        return False
    order = read_member(file, member) if member.size <= 16 else b""
    if order not in (b"little", b"big"):
        raise CheckpointError(f"{file.path}: its byte order should be little or big, but is {shown(order)}.")
    return order == b"big"


def _refuse_programs(file: SourceFile, members: dict[str, Member], root: str) -> None:
    if f"{root}constants.pkl" in members or any(name.startswith(f"{root}code/") for name in members):
        raise UnsafeCheckpointError(
            f"{file.path}: is a TorchScript program (torch.jit.save), not a checkpoint. It was not executed. Load it "
            "with torch.jit.load where you trust it, and save its state_dict() with torch.save."
        )
    if f"{root}.data/extern_modules" in members:
        raise UnsafeCheckpointError(
            f"{file.path}: is a torch.package of Python code, not a checkpoint. It was not executed. Load it where "
            "you trust it, and save its model's state_dict() with torch.save."
        )
