"""MUGE's image table: a TSV of `id<TAB>base64`, indexed once by byte offset and read by seek."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.columns import check_letters, decode_text, kind_of
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import Line, Part, PinnedFile, RecordIndex, index_records
from weightport.finetuning.data.hashing import key_of
from weightport.finetuning.data.samples import Picture

IMAGE_ID = "image_id"
"""The column of MUGE's captions that names a picture."""

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class EncodedImage:
    """Base64 at a place in a file, in the standard or the URL-safe alphabet, padded or not."""

    file: PinnedFile
    offset: int
    length: int
    place: str

    def __call__(self) -> bytes:
        text = self.file.read(self.offset, self.length).translate(_URL_SAFE, b" \t\r\n").rstrip(b"=")
        try:
            return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
        except binascii.Error as error:
            raise DataError(f"{self.place}: the image is broken base64: {error}.") from error


class ImageTable:
    """The rows of a TSV by their id. Opening reads the file once, without decoding an image.

    Raises DataError, or has `faults` collect it, for a row that is not an id, a tab and base64, and for an id that
    stands twice.
    """

    def __init__(self, path: Path, faults: Faults) -> None:
        self.path = path

        def examine(line: Line) -> Sequence[Part]:
            name, _, _ = split_row(line, self._place(line.number))
            return (Part(len(name), key_of(name)),)

        file = PinnedFile(path)
        self.index: RecordIndex = index_records(file, file.lines(), examine, faults)
        self._order = np.argsort(self.index.keys, kind="stable")
        self._keys = self.index.keys[self._order]
        for position in np.flatnonzero(self._keys[1:] == self._keys[:-1]) + 1:
            self._check_alone(int(position), faults)

    def find(self, name: str) -> int | None:
        """The row of an image id, or None."""
        wanted = name.encode()
        key = key_of(wanted)
        for position in range(*(int(np.searchsorted(self._keys, key, side=side)) for side in ("left", "right"))):
            row = int(self._order[position])
            if self._name(row) == wanted:
                return row
        return None

    @property
    def identity(self) -> object:
        """What changes with the file."""
        return self.index.file.identity

    def look_up(self, name: Any, place: str) -> tuple[str, int, int]:
        """Name of an image, bytes of its base64, and its row. Raises DataError for one that is not there."""
        known = image_id(name, place)
        row = self.find(known)
        if row is None:
            raise DataError(f"{place}: the image id {known} is not in {self.path}.")
        return known, int(self.index.lengths[row]), row

    def picture(self, name: Any, place: str) -> Picture:
        """The picture of an image id, not read. Raises DataError for one that is not there."""
        known, _, row = self.look_up(name, place)
        return self._picture(row, known)

    def _picture(self, row: int, name: str) -> Picture:
        number, offset, length = (int(a[row]) for a in (self.index.numbers, self.index.offsets, self.index.lengths))
        start = len(name.encode()) + 1
        place = self._place(number)
        return Picture(name, place, EncodedImage(self.index.file, offset + start, length - start, place))

    def _name(self, row: int) -> bytes:
        return self.index.file.read(int(self.index.offsets[row]), int(self.index.counts[row]))

    def _check_alone(self, position: int, faults: Faults) -> None:
        before, row = int(self._order[position - 1]), int(self._order[position])
        name = self._name(row)
        if name == self._name(before):
            faults.add(
                DataError(
                    f"{self._place(int(self.index.numbers[row]))}: the image id {name.decode()} stands in line "
                    f"{self.index.numbers[before]} already."
                )
            )

    def _place(self, number: int) -> str:
        return f"{self.path}, line {number}"


def image_id(value: Any, place: str) -> str:
    """An id as the table writes it. MUGE's captions hold it as a text or as a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{place}: an image id was expected, found {kind_of(value)}.")
    check_letters(str(value), IMAGE_ID, place)
    return str(value)


def split_row(line: Line, place: str) -> tuple[bytes, int, int]:
    """Image id, and byte offset and length of the base64. Raises DataError for any other row."""
    name, tab, _ = line.content.partition(b"\t")
    if not tab:
        raise DataError(f"{place}: no tab. An image id, a tab, and the image in base64 were expected.")
    if not decode_text(name, place).strip():
        raise DataError(f"{place}: no image id before the tab.")
    start = len(name) + 1
    length = len(line.content) - start
    if not length or line.content[start : start + 64].isspace():
        raise DataError(f"{place}: no image after the tab.")
    if line.content.find(b"\t", start) >= 0:
        raise DataError(f"{place}: more than two columns. An image id, a tab, and the image in base64 were expected.")
    return name, line.offset + start, length
