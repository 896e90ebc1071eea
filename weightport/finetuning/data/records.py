"""How text files are cut into records: lines of JSON, one JSON list, and CSV."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from weightport.errors import DataError
from weightport.finetuning.data.columns import decode_text, parse_object, shown
from weightport.finetuning.data.files import LONGEST_LINE, Line, PinnedFile

LOOKED_AT = 100
"""Broken records at the start of a file that are passed over to find one that says which columns there are."""

CHUNK = 2**20
"""Bytes of a JSON list that are read at first; twice as many where a record does not end in them."""

DELIMITERS = (",", ";", "\t")
"""Of a .csv file: the one that cuts its first line into the most names, the comma first."""


class RecordFormat(Protocol):
    """A way of writing records into a text file. `expected`: what an empty file lacks."""

    expected: str

    def records(self, file: PinnedFile) -> Iterator[Line]:
        """All records in order, in one pass. Raises DataError where the rest of the file cannot be cut."""

    def parse(self, content: bytes, place: str) -> dict[str, Any]:
        """The values of a record by column. Raises DataError, naming `place`."""


def first_record(file: PinnedFile, layout: RecordFormat) -> dict[str, Any]:
    """The first record that can be read: it says which columns there are.

    Raises DataError where there is none: the file is empty, or what is wrong with its first record.
    """
    fault = DataError(f"{file.path} is empty. {layout.expected} was expected.")
    for count, line in enumerate(line for line in layout.records(file) if line.content.strip()):
        try:
            return layout.parse(line.content, f"{file.path}, line {line.number}")
        except DataError as error:
            fault = error if count == 0 else fault
        if count == LOOKED_AT:
            break
    raise fault


@dataclass(frozen=True)
class JsonLines:
    """A JSON object a line."""

    expected = "A JSON object a line"

    def records(self, file: PinnedFile) -> Iterator[Line]:
        return file.lines()

    def parse(self, content: bytes, place: str) -> dict[str, Any]:
        return parse_object(content, place)


@dataclass(frozen=True)
class JsonList:
    """One JSON list of objects, as LLaVA's annotations are; read in pieces, however large it is."""

    expected = "A JSON list of objects"

    def records(self, file: PinnedFile) -> Iterator[Line]:
        scan = _ListScan(file)
        while (line := scan.next()) is not None:
            yield line

    def parse(self, content: bytes, place: str) -> dict[str, Any]:
        return parse_object(content, place)


class _ListScan:
    """The objects of a JSON list one after the other. Bytes are taken for Latin-1, in which every byte is a letter and
    JSON's own signs are what they are in UTF-8, so that places in the text are places in the file."""

    _space = re.compile(r"[ \t\r\n]*")

    def __init__(self, file: PinnedFile) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._offset = 3 if file.read(0, min(3, file.size)) == b"\xef\xbb\xbf" else 0
        self._text, self._at, self._line, self._items, self._ended = "", 0, 1, 0, False

    def next(self) -> Line | None:
        """The next object, None behind the last. Raises DataError where the list is broken."""
        if self._ended:
            return None
        sign = self._sign()
        if not self._items:
            if sign == "" and not self._text:
                return None
            self._expect(sign == "[", "a list was expected")
            self._skip(1)
            sign = self._sign()
        elif sign == ",":
            self._skip(1)
            sign = self._sign()
            self._expect(sign != "]", "an object was expected behind the comma")
        else:
            self._expect(sign == "]", "a comma or the end of the list was expected")
        if sign == "]":
            self._skip(1)
            self._expect(self._sign() == "", "nothing was expected behind the list")
            self._ended = True
            return None
        return self._object()

    def _object(self) -> Line:
        size = CHUNK
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on in the bytes to come.
                if end < len(self._text) or not self._more(CHUNK):
                    break
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LONGEST_LINE or not self._more(size):
                    self._skip(max(error.pos, self._at) - self._at)
                    raise self._broken(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._broken(str(error)) from error
            size *= 2
        self._items += 1
        content = self._text[self._at : end].encode("latin-1")
        found = Line(self._line, self._offset + self._at, content, self._items)
        self._skip(end - self._at)
        return found

    def _sign(self) -> str:
        """The next character that is no space, empty at the end."""
        while True:
            found = self._space.match(self._text, self._at)
            self._skip(found.end() - self._at if found else 0)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(CHUNK):
                return ""

    def _skip(self, letters: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + letters)
        self._at += letters

    def _more(self, size: int) -> bool:
        """Read on, and let go of what is behind."""
        self._offset += self._at
        self._text, self._at = self._text[self._at :], 0
        begin = self._offset + len(self._text)
        read = self._file.read(begin, min(size, self._file.size - begin))
        self._text += read.decode("latin-1")
        return bool(read)

    def _expect(self, right: bool, words: str) -> None:
        if not right:
            raise self._broken(words)

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self._file.path}, line {self._line}, after {self._items} objects: broken JSON: {reason}.")


@dataclass(frozen=True)
class Csv:
    """Comma-separated values below a line of names, as RFC 4180 has them: quotes around what holds commas or line
    ends, doubled within. `names`: of the columns."""

    delimiter: str
    names: tuple[str, ...]

    expected = "A line of column names, and one for each sample,"

    def records(self, file: PinnedFile) -> Iterator[Line]:
        records = _csv_records(file, self.delimiter)
        next(records, None)
        return records

    def parse(self, content: bytes, place: str) -> dict[str, Any]:
        fields = _fields(decode_text(content, place), self.delimiter, place)
        if len(fields) != len(self.names):
            columns = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
            mend = f"Put quotes around what holds {self.delimiter!r}."
            if len(fields) < len(self.names):
                mend = f"Write one {self.delimiter!r} less than there are names: what is empty is a column too."
            raise DataError(
                f"{place}: {columns}, where the first line names {len(self.names)} "
                f"({', '.join(map(shown, self.names[:10]))}). {mend}"
            )
        return dict(zip(self.names, fields))


def csv_format(file: PinnedFile) -> Csv:
    """The delimiter and the column names of a .csv or .tsv file. Raises DataError for an empty file, and for a first
    line that cannot be names."""
    first = next(_csv_records(file, ","), None)
    if first is None:
        raise DataError(f"{file.path} is empty. {Csv.expected} was expected.")
    place = f"{file.path}, line {first.number}"
    text = decode_text(first.content, place)
    tabs = file.path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else max(DELIMITERS, key=lambda each: len(_fields(text, each, place)))
    names = tuple(name.strip() for name in _fields(text, delimiter, place))
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{place}: the column {shown(twice[0])!r} stands twice among the names.")
    return Csv(delimiter, names)


def _csv_records(file: PinnedFile, delimiter: str) -> Iterator[Line]:
    """All records, the line of names too. One that the csv module refuses is given as it is: parsing says why."""
    held: list[Line] = []

    def texts() -> Iterator[str]:
        for line in file.lines():
            held.append(line)
            # As Latin-1, in which every byte is a letter: what a record holds is decoded when it is parsed.
            yield line.content.decode("latin-1") + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        held.clear()
        try:
            next(reader)
        except StopIteration:
            return
        except csv.Error:
            pass
        if not held:
            return
        first, last = held[0], held[-1]
        if len(held) == 1:
            yield first
        else:
            length = last.offset + len(last.content) - first.offset
            yield first._replace(content=file.read(first.offset, length))


def _fields(text: str, delimiter: str, place: str) -> list[str]:
    try:
        return next(csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise DataError(f"{place}: broken CSV: {error}.") from error


def has_names(path: Path, known: tuple[str, ...]) -> bool:
    """Whether the first line of a .tsv file names one of the `known` columns: MUGE's tables of images have no
    names."""
    first = next(PinnedFile(path).lines(), None)
    return first is not None and any(name.encode() in first.content.split(b"\t") for name in known)
