"""Checkpoint files made by hand, as hostile or as odd as a test wants them."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Call:
    """Pickles as the call `function(*args)`, which whoever unpickles it naively makes."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


class StorageId(tuple):
    """Pickles as a persistent id, as torch names storages."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return tuple(value) if isinstance(value, StorageId) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def storage_id(key: str = "0", count: int = 12, kind: Any = torch.FloatStorage) -> StorageId:
    return StorageId(("storage", kind, key, "cpu", count))


def tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> Call:
    """A tensor of an archive, with any layout, sensible or not."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})


def write_archive(
    path: Path,
    document: Any,
    storages: dict[str, bytes] | None = None,
    *,
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
    root: str = "archive",
) -> Path:
    """A torch zip archive with `document` (or, of bytes, that pickle) and `storages`: key to bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", document if isinstance(document, bytes) else pickled(document))
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")
    return path


@contextmanager
def foreign_classes(**modules: dict[str, type]) -> Iterator[None]:
    """Classes under the names of modules that are not installed, so that pickles can name them.

    `foreign_classes(omegaconf__nodes={"AnyNode": AnyNode})`: two underscores are a dot.
    """
    made: list[str] = []
    for module, classes in modules.items():
        name = module.replace("__", ".")
        for parent in [".".join(name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1)]:
            if parent not in made:
                assert parent not in sys.modules
                sys.modules[parent] = types.ModuleType(parent)
                made.append(parent)
        for class_name, kind in classes.items():
            kind.__module__, kind.__qualname__ = name, class_name
            setattr(sys.modules[name], class_name, kind)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
