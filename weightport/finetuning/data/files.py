"""Text files read by record and by byte offset: indexed in one sequential pass, then read where a record stands."""

from __future__ import annotations

import os
import stat
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.faults import Faults

LONGEST_LINE = 256 * 2**20
"""Bytes. A base64 image of 190 MB fits; a binary file without line ends does not fill the memory."""

MOST_OPEN = 128
"""Files that a process keeps open."""

_BUFFER = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line, or a record that begins in it: the line's number, counted from 1, the record's byte offset, and its
    bytes without the line end. item: the record's number, where records are not told apart by their lines."""

    number: int
    offset: int
    content: bytes
    item: int = 0


class Part(NamedTuple):
    """What examining a record gives for each row in it: how many answers it has, and a key that is equal where two
    rows ask the same question about the same picture."""

    answers: int
    key: int


class PinnedFile:
    """A file read at byte offsets from several processes, which must stay as it was when it was opened.

    It is opened at the first read and pickles closed. A forked process may share the open file: reads name their
    offset. Raises DataError when it is missing, no regular file, or has changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(found.st_mode):
            raise no_file(path)
        self.size, self.modified = found.st_size, found.st_mtime_ns

    @property
    def identity(self) -> tuple[str, int, int]:
        """Absolute path, bytes, and time of the last change in nanoseconds."""
        return os.path.abspath(self.path), self.size, self.modified

    def read(self, offset: int, length: int) -> bytes:
        try:
            content = os.pread(self._open(), length, offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(content) != length:
            raise self._changed()
        return content

    def lines(self) -> Iterator[Line]:
        """All lines in order, blank ones too. One line is in memory at a time."""
        try:
            with open(self.path, "rb", buffering=_BUFFER) as file:
                yield from self._lines(file.readline)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error

    def _lines(self, readline: Callable[[int], bytes]) -> Iterator[Line]:
        offset, number = 0, 0
        while raw := readline(LONGEST_LINE):
            number += 1
            if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                raise DataError(
                    f"{self.path}, line {number}: longer than {LONGEST_LINE >> 20} MiB. Is this a text file?"
                )
            mark = len(_BYTE_ORDER_MARK) if number == 1 and raw.startswith(_BYTE_ORDER_MARK) else 0
            yield Line(number, offset + mark, raw[mark:].rstrip(b"\r\n"))
            offset += len(raw)

    def _open(self) -> int:
        if self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDONLY)
            found = os.fstat(descriptor)
            if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
                os.close(descriptor)
                raise self._changed()
            _opened.keep(self, descriptor)
            self._descriptor = descriptor
        return self._descriptor

    def forget(self) -> None:
        """The open file has been closed; the next read opens it again."""
        self._descriptor = None

    def _changed(self) -> DataError:
        return DataError(f"{self.path} has changed since it was opened. Start again, and leave it alone meanwhile.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


class _OpenFiles:
    """The files that are open, the one opened longest ago closed for a new one: data sets of thousands of shards are
    read by processes that may open a thousand files."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: OrderedDict[int, tuple[weakref.ref[PinnedFile], int]] = OrderedDict()

    def keep(self, file: PinnedFile, descriptor: int) -> None:
        key = id(file)
        self._held[key] = weakref.ref(file, lambda _: self._close(key)), descriptor
        while len(self._held) > self.most:
            self._close(next(iter(self._held)))

    def _close(self, key: int) -> None:
        reference, descriptor = self._held.pop(key, (None, -1))
        if reference is None:
            return
        os.close(descriptor)
        file = reference()
        if file is not None:
            file.forget()


_opened = _OpenFiles(MOST_OPEN)


def no_file(path: object) -> DataError:
    """The error for a pipe, a device or a folder in place of a file: standard input's name, too."""
    if os.path.isdir(str(path)):
        return DataError(f"{path} is a folder, and a file was expected.")
    return DataError(
        f"{path} is no regular file. What comes from a pipe can be read once, in its own order, and every epoch reads "
        "samples in another: give files, which are read where they lie, on any file system that is mounted."
    )


@dataclass(frozen=True)
class RecordIndex:
    """Where the good rows of a file stand, 36 bytes a row, whatever the records hold.

    numbers, offsets, lengths: int64 [rows], of the record: its line, byte offset and bytes.
    counts: int32 [rows] and keys: int64 [rows] are what examining the record gave (see `Part`).
    items: int64 [rows], the records' numbers, None where lines tell them apart. places: int32 [rows, 2], which row of
    its record a row is, and of how many, None where every record is one.
    """

    file: PinnedFile
    numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    keys: np.ndarray
    items: np.ndarray | None
    places: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets)

    def line(self, row: int) -> Line:
        offset = int(self.offsets[row])
        content = self.file.read(offset, int(self.lengths[row]))
        return Line(int(self.numbers[row]), offset, content, int(self.items[row]) if self.items is not None else 0)

    def place(self, row: int) -> tuple[int, int]:
        """Which row of its record a row is, and of how many."""
        return (0, 1) if self.places is None else (int(self.places[row, 0]), int(self.places[row, 1]))


def index_records(
    file: PinnedFile, records: Iterable[Line], examine: Callable[[Line], Sequence[Part]], faults: Faults
) -> RecordIndex:
    """Goes through the records once. `examine` returns what is to be known of a record's rows, or raises the DataError
    that `faults` collects.

    Blank records have no rows.
    """
    long = {name: array("q") for name in ("numbers", "offsets", "lengths", "keys", "items")}
    counts, places = array("i"), array("i")
    for line in records:
        if not line.content or line.content.isspace():
            continue
        try:
            parts = examine(line)
        except DataError as fault:
            faults.add(fault)
            continue
        for place, part in enumerate(parts):
            long["numbers"].append(line.number)
            long["offsets"].append(line.offset)
            long["lengths"].append(len(line.content))
            long["keys"].append(part.key)
            long["items"].append(line.item)
            counts.append(part.answers)
            places.extend((place, len(parts)))
    found = {name: np.array(values, dtype=np.int64) for name, values in long.items()}
    items, of_record = found.pop("items"), np.array(places, dtype=np.int32).reshape(-1, 2)
    return RecordIndex(
        file,
        counts=np.array(counts, dtype=np.int32),
        items=items if items.any() else None,
        places=of_record if (of_record[:, 1] != 1).any() else None,
        **found,
    )
