"""Writes torch's zip archives without building a state dict: tensors are streamed as they are asked for.

The archive is what torch.save would write: `data.pkl` first, then one stored record a storage, aligned to 64 bytes. It
loads with torch.load; with weights_only=True too when the document holds no Instance.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from weightport.writing.outgoing import Outgoing
from weightport.writing.ownership import MADE_BY
from weightport.writing.safetensors_shards import as_bytes

ALIGNMENT = 64
LOCAL_HEADER, ZIP64_EXTRA = 30, 20  # bytes, of the zip format
ZIP64_BYTES = 1 << 31  # records from this size on get 64-bit sizes
ROOT = "archive"

_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}


@dataclass(frozen=True)
class Instance:
    """An object of a class that is named, never imported: `module.name` with these attributes."""

    module: str
    name: str
    attributes: dict[str, Any] = field(default_factory=dict)


def write_torch_archive(document: Any, path: Path, *, advance: Callable[[int], None] = lambda count: None) -> None:
    """Write `document` (plain containers, Outgoing, Instance) to `path` as torch.save would."""
    storages: dict[str, Outgoing] = {}
    buffer = io.BytesIO()
    _DocumentPickler(buffer, storages).dump(document)
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_aligned(file, f"{ROOT}/data.pkl"), buffer.getvalue())
        archive.writestr(_aligned(file, f"{ROOT}/byteorder"), b"little")
        for number, tensor in enumerate(storages.values()):
            large = tensor.nbytes >= ZIP64_BYTES
            record = _aligned(file, f"{ROOT}/data/{number}", large)
            record.file_size = tensor.nbytes
            with archive.open(record, "w", force_zip64=large) as out:
                for part in tensor.blocks():
                    out.write(as_bytes(part))
                    advance(part.numel() * part.element_size())
        archive.writestr(_aligned(file, f"{ROOT}/version"), b"3\n")
        # Behind the archive's end, where no reader of checkpoints looks: by this --overwrite knows the file again.
        archive.comment = MADE_BY.encode()


def _aligned(file: IO[bytes], name: str, large: bool = False) -> zipfile.ZipInfo:
    """A record whose data will begin at a multiple of ALIGNMENT: the extra field takes up the slack.

    `large`: zipfile appends its own extra field of ZIP64_EXTRA bytes for the 64-bit sizes.
    """
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_STORED
    start = file.tell() + LOCAL_HEADER + len(name.encode()) + 4 + (ZIP64_EXTRA if large else 0)
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return info


class _Global:
    """A global reference, written as its name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _DocumentPickler(pickle._Pickler):
    """Protocol 2, as torch writes it. Named classes are emitted by name, so nothing needs to be importable here."""

    write: Callable[[bytes], Any]

    def __init__(self, out: io.BytesIO, storages: dict[str, Outgoing]) -> None:
        super().__init__(out, protocol=2)
        self._storages = storages
        self._numbers: dict[str, int] = {}
        self._alive: list[Any] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        number = self._numbers.setdefault(obj.tensor.storage_key, len(self._numbers))
        count = torch.Size(obj.tensor.shape).numel()
        kind = _Global("torch", _STORAGES[obj.tensor.dtype])
        return self._keep(("storage", kind, str(number), "cpu", count))

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Instance):
            self._save_instance(obj)
        elif isinstance(obj, Outgoing):
            self._save_tensor(obj)
        else:
            super().save(obj, save_persistent_id)  # type: ignore[misc]

    def _save_instance(self, obj: Instance) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode() + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(obj.attributes)
        self.write(pickle.BUILD)

    def _save_tensor(self, obj: Outgoing) -> None:
        self._storages.setdefault(obj.storage_key, obj)
        stride = torch.empty(obj.shape, device="meta").stride()
        self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
        self.save(self._keep((_Storage(obj), 0, tuple(obj.shape), tuple(stride), False, _OrderedDict())))
        self.write(pickle.REDUCE)

    def _keep(self, obj: Any) -> Any:
        # The pickler's memo knows objects by id: they must outlive the dump.
        self._alive.append(obj)
        return obj


@dataclass(frozen=True, eq=False)
class _Storage:
    tensor: Outgoing


class _OrderedDict:
    """An empty collections.OrderedDict, as torch writes for a tensor's hooks."""

    def __reduce__(self) -> Any:
        from collections import OrderedDict

        return OrderedDict, ()
