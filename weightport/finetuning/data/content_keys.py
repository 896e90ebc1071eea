"""Keys of rows by what they are about: the bytes of a picture, or of text alone what is asked."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.hashing import key_of
from weightport.finetuning.data.samples import Picture

SECONDS_BETWEEN_LINES = 15.0

Tick = Callable[[int], None]
"""Called with the number of pictures that have been read since the last call."""


class PicturesRead:
    """Lets `say` show now and then how many pictures have been read. `rows`: of the data, for the message."""

    def __init__(self, rows: int, say: Callable[[str], None]) -> None:
        self.rows, self.say, self.done = rows, say, 0
        self.begun = self.told = time.monotonic()

    def __call__(self, pictures: int) -> None:
        self.done += pictures
        if (now := time.monotonic()) - self.told < SECONDS_BETWEEN_LINES:
            return
        self.told = now
        rate = self.done / (now - self.begun)
        self.say(f"share by content: {self.done:,} pictures of {self.rows:,} rows read · {rate:,.0f} a second")


def keys_by_content(names: np.ndarray, entry: Callable[[int], Entry], tick: Tick) -> np.ndarray:
    """int64 [rows], equal where two rows are about the same picture, whatever it is called, and the same in every run.

    names: int64 [rows], equal only where rows name the same picture: each is read once, in the order of rows, and none
    is kept. Of a row without a picture, the key is that of its text.
    """
    _, firsts, numbers = np.unique(names, return_index=True, return_inverse=True)
    keys = np.zeros(len(firsts), dtype=np.int64)
    for number in np.argsort(firsts, kind="stable").tolist():
        keys[number] = _key_of_entry(entry(int(firsts[number])))
        tick(1)
    return keys[numbers]


def _key_of_entry(found: Entry) -> int:
    if found.picture is None:
        return text_key(found)
    try:
        return picture_key(found.picture.stored())
    except DataError:
        return broken_key(found.picture)


def picture_key(content: bytes) -> int:
    """The key of a picture: of its bytes as they are stored, so that no picture is decoded."""
    return key_of(b"picture", content)


def text_key(found: Entry) -> int:
    """The key of a row of text alone. The answers of a chat are about what it began with."""
    asked = found.history[0][0] if found.history else found.prefix
    texts = [asked] if asked.strip() else found.answers
    return key_of(b"text", *(text.encode() for text in texts))


def broken_key(picture: Picture) -> int:
    """The key of a picture that cannot be read: by its name. What is wrong with it is said where it is trained on or
    measured, where bad samples may be left out."""
    return key_of(b"unread", picture.key.encode())
