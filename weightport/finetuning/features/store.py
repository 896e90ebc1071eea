"""Features on disk: records of one size in one file, mapped into memory and read by any number of processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightport.errors import OutputError
from weightport.formatting import size

HEADER, STATES, LENGTHS = "header.json", "states.bin", "lengths.bin"
FORMAT = 1


@dataclass(frozen=True)
class Layout:
    """`records` tensors of `shape` [rows, …] and `dtype`. `key`: 64 hexadecimal digits of all that they depend on."""

    key: str
    records: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def record_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.records * self.record_bytes

    def header(self) -> dict[str, Any]:
        """What header.json says."""
        return {"format": FORMAT, **asdict(self), "shape": list(self.shape), "dtype": str(self.dtype)}


class FeatureStore:
    """A whole folder of features: `states.bin` (the records), `lengths.bin` (int32, rows of each record that count;
    0: its picture could not be read) and `header.json`, which is written last. Pickles without its map.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.lengths = np.fromfile(folder / LENGTHS, dtype=np.int32)
        self._mapped: np.ndarray | None = None

    def read(self, records: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(states [len(records), rows, …] with as many rows as the longest has, zeros behind shorter ones; lengths
        int64 [len(records)])."""
        if self._mapped is None:
            self._mapped = np.memmap(self.folder / STATES, dtype=np.uint8, mode="r")
        lengths = torch.from_numpy(self.lengths[list(records)].astype(np.int64))
        states = torch.zeros(len(records), int(lengths.max()), *self.layout.shape[1:], dtype=self.layout.dtype)
        flat = states.view(len(records), -1).view(torch.uint8).numpy()
        row_bytes = self.layout.record_bytes // self.layout.shape[0]
        for place, record, length in zip(flat, records, lengths.tolist()):
            start = record * self.layout.record_bytes
            place[: length * row_bytes] = self._mapped[start : start + length * row_bytes]
        return states, lengths

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


def open_store(folder: Path, layout: Layout) -> FeatureStore | None:
    """The features in `folder`, or None where they are not whole or are others."""
    try:
        header = json.loads((folder / HEADER).read_text("utf-8"))
        sizes = [os.path.getsize(folder / name) for name in (STATES, LENGTHS)]
    except (OSError, ValueError):
        return None
    if header != layout.header() or sizes != [layout.nbytes, 4 * layout.records]:
        return None
    return FeatureStore(folder, layout)


class StoreWriter:
    """Records written in any order, by any number of processes, into a folder that `open_store` does not know until
    `finish` has given it its name."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.work = partial(folder)

    def begin(self) -> None:
        """Make the files, in one process. What a killed process left is thrown away."""
        with _said(self.folder):
            for stale in (self.work, self.folder):
                shutil.rmtree(stale, ignore_errors=True)
            self.work.mkdir(parents=True)
            for name, size in ((STATES, self.layout.nbytes), (LENGTHS, 4 * self.layout.records)):
                with open(self.work / name, "wb") as file:
                    file.truncate(size)

    @contextmanager
    def writing(self) -> Iterator[RecordFile]:
        """The open files; what was written is on the disk when the block ends."""
        with (
            _said(self.folder),
            open(self.work / STATES, "r+b") as states,
            open(self.work / LENGTHS, "r+b") as lengths,
        ):
            yield RecordFile(self.layout, states.fileno(), lengths.fileno())
            for file in (states, lengths):
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Say that the features are whole, in one process when all have written."""
        with _said(self.folder):
            (self.work / HEADER).write_text(json.dumps(self.layout.header(), indent=1), "utf-8")
            os.rename(self.work, self.folder)


@dataclass(frozen=True)
class RecordFile:
    """Open files that records are written to."""

    layout: Layout
    states: int
    lengths: int

    def write(self, record: int, states: torch.Tensor) -> None:
        """The rows of a record that count, [at most rows, …]; what is not written stays a hole in the file."""
        content = memoryview(states.contiguous().cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        _write_all(self.states, content, record * self.layout.record_bytes)
        _write_all(self.lengths, memoryview(np.int32(len(states)).tobytes()), 4 * record)


def _write_all(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other run on this machine fills the folder."""
    import fcntl

    with _said(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_name(f"{folder.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def partial(folder: Path) -> Path:
    """Where features are written before they are whole."""
    return folder.with_name(f"{folder.name}.partial")


def require_space(folder: Path, layout: Layout) -> None:
    """Raises OutputError when the disk cannot hold the features."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if layout.nbytes > free:
        raise OutputError(
            f"{existing} has {size(free)} free, and --cache-features needs {size(layout.nbytes)} there "
            f"({layout.records:,} records). Set model.feature_folder to a larger disk, or train without."
        )


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"Features cannot be written to {folder}: {error.strerror or error}.") from error
