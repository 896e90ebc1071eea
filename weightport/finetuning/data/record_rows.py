"""Data sets in a text file of records, with their pictures in folders or in MUGE's table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from weightport.finetuning.data.content_keys import Tick, keys_by_content
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import Line, Part, PinnedFile, index_records
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.records import RecordFormat
from weightport.finetuning.data.rows import Row, RowReader
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.data.settings import DataSettings


class Images(Protocol):
    """Where the pictures of records are."""

    @property
    def identity(self) -> object: ...

    def look_up(self, name: Any, place: str) -> tuple[str, int, int]:
        """A picture's name as a text, its size, and a number that changes with it. Raises DataError for a name that
        leads nowhere."""

    def picture(self, name: Any, place: str) -> Picture:
        """The picture, not read. Raises DataError for a name that leads nowhere."""


class RecordRows:
    """The rows of a file's records. Opening reads the file once and checks every record and that its picture is there;
    no picture is decoded.

    `kind` names the layout in fingerprints; `each_answer`: see `Source`. `faults` may hold what is wrong with the
    pictures' table already.
    """

    def __init__(
        self,
        file: PinnedFile,
        settings: DataSettings,
        layout: RecordFormat,
        reader: RowReader,
        images: Images,
        *,
        kind: str,
        each_answer: bool = False,
        faults: Faults | None = None,
    ) -> None:
        self.name = str(file.path)
        self.layout, self.reader, self.images, self.each_answer = layout, reader, images, each_answer
        self.text_only = settings.text_only
        faults = faults or Faults(settings.skip_bad)
        images_seen, rows_seen = hashlib.blake2b(), hashlib.blake2b()

        def examine(line: Line) -> Sequence[Part]:
            parts, seen, pictures = [], [], []
            place = self._place(line)
            for row in self._rows(line, place):
                image, size, modified = self._looked_up(row, place)
                pictures.append(f"{image}\0{size}\0{modified}\n")
                said = f"{row.question!r} {row.answers!r}"
                seen.append(f"{image!r} {size} {said}{f' {row.history!r}' if row.history else ''}\n")
                texts = [text.encode() for pair in row.history for text in pair]
                named = b"" if image is None else image.encode()
                parts.append(Part(len(row.answers), key_of(named, *texts, row.question.encode())))
            images_seen.update("".join(pictures).encode())
            rows_seen.update("".join(seen).encode())
            return parts

        self.index = index_records(file, layout.records(file), examine, faults)
        self.skipped = tuple(faults.skipped)
        self.content = fingerprint_of([kind, rows_seen.hexdigest()])
        self.fingerprint = fingerprint_of(
            [kind, file.identity, images.identity, asdict(settings), images_seen.hexdigest()]
        )

    @property
    def answer_counts(self) -> np.ndarray:
        return self.index.counts

    @property
    def question_keys(self) -> np.ndarray:
        return self.index.keys

    def picture_keys(self, tick: Tick) -> np.ndarray:
        """The file is read once more, for the names of pictures."""
        names = np.array([self._named(row) for row in range(len(self.index))], dtype=np.int64)
        return keys_by_content(names, self.entry, tick)

    def entry(self, row: int) -> Entry:
        line = self.index.line(row)
        place, (number, rows) = self._place(line), self.index.place(row)
        found = self._row(line, number)
        if rows > 1:
            place = f"{place}, answer {number + 1}"
        picture = None if found.image is None else self.images.picture(found.image, place)
        return Entry(place, picture, found.question, found.answers, history=found.history)

    def _named(self, row: int) -> int:
        """A key of the picture's name, of a row without one the row's own."""
        line = self.index.line(row)
        found = self._row(line, self.index.place(row)[0])
        if found.image is None:
            return key_of(b"row", str(row).encode())
        return key_of(self.images.look_up(found.image, self._place(line))[0].encode())

    def _row(self, line: Line, number: int) -> Row:
        """The row `number` among those of a record."""
        return self._rows(line, self._place(line))[number]

    def _rows(self, line: Line, place: str) -> Sequence[Row]:
        return self.reader(self.layout.parse(line.content, place), place)

    def _looked_up(self, row: Row, place: str) -> tuple[str | None, int, int]:
        if row.image is None and self.text_only:
            return None, 0, 0
        return self.images.look_up(row.image, place)

    def _place(self, line: Line) -> str:
        """The file and the number of the line, for messages."""
        return f"{self.name}, line {line.number}{f' (object {line.item})' if line.item else ''}"
