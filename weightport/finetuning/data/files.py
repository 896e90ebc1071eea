"""Text files read by line and by byte offset: indexed in one sequential pass, then read where a line stands."""

from __future__ import annotations

import os
import stat
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.faults import Faults

LONGEST_LINE = 256 * 2**20
"""Bytes. A base64 image of 190 MB fits; a binary file without line ends does not fill the memory."""

_BUFFER = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line: its number, counted from 1, its byte offset, and its bytes without the line end."""

    number: int
    offset: int
    content: bytes


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
            raise DataError(f"{path} is no regular file.")
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
            weakref.finalize(self, os.close, descriptor)
            found = os.fstat(descriptor)
            if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
                raise self._changed()
            self._descriptor = descriptor
        return self._descriptor

    def _changed(self) -> DataError:
        return DataError(f"{self.path} has changed since it was opened. Start again, and leave it alone meanwhile.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


@dataclass(frozen=True)
class LineIndex:
    """Where the good lines of a file stand, 36 bytes a line, whatever the lines hold.

    numbers, offsets, lengths: int64 [lines], the line's number, byte offset and bytes.
    counts: int32 [lines] and keys: int64 [lines] are what examining the line gave.
    """

    file: PinnedFile
    numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def line(self, row: int) -> Line:
        offset = int(self.offsets[row])
        return Line(int(self.numbers[row]), offset, self.file.read(offset, int(self.lengths[row])))


def index_lines(file: PinnedFile, examine: Callable[[Line], tuple[int, int]], faults: Faults) -> LineIndex:
    """Reads the file once. `examine` returns a line's count and key, or raises the DataError that `faults` collects.

    Blank lines are no rows.
    """
    numbers, offsets, lengths, counts, keys = array("q"), array("q"), array("q"), array("i"), array("q")
    for line in file.lines():
        if not line.content or line.content.isspace():
            continue
        try:
            count, key = examine(line)
        except DataError as fault:
            faults.add(fault)
            continue
        numbers.append(line.number)
        offsets.append(line.offset)
        lengths.append(len(line.content))
        counts.append(count)
        keys.append(key)
    return LineIndex(
        file,
        np.array(numbers, dtype=np.int64),
        np.array(offsets, dtype=np.int64),
        np.array(lengths, dtype=np.int64),
        np.array(counts, dtype=np.int32),
        np.array(keys, dtype=np.int64),
    )
