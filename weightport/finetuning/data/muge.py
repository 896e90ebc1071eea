"""MUGE's image captions: JSONL {"image_id", "text": [...]} beside a TSV of images."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.columns import (
    Columns,
    answers_of,
    check_letters,
    kind_of,
    parse_object,
    question_of,
    value_of,
)
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import Line, PinnedFile, index_lines
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import find_companion
from weightport.finetuning.data.image_table import ImageTable
from weightport.finetuning.data.line_rows import LineRows
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.splits import split_named

IMAGE_ID, TEXT = "image_id", "text"
SUFFIXES = ("", "_imgs", "_images", "_img")
"""What the image table of `train.jsonl` is called: train.tsv, train_imgs.tsv, …"""


class MugeCaptions(LineRows):
    """Captions and the table with their images. For training, every pair of an image and a caption is a sample.

    Opening reads both files once, checks every line and that its image is in the table; no image is decoded.
    """

    each_answer = True

    def __init__(self, path: Path, settings: DataSettings) -> None:
        self.name = str(path)
        self.columns = Columns(
            settings.image_column or IMAGE_ID, settings.prefix_column, settings.suffix_column or TEXT
        )
        faults = Faults(settings.skip_bad)
        captions, rows_seen = PinnedFile(path), hashlib.blake2b()
        self.images = ImageTable(find_image_table(path, settings.images), faults)

        def examine(line: Line) -> tuple[int, int]:
            place = self.place_of(line)
            found = parse_object(line.content, place)
            question = question_of(found, self.columns.prefix, place)
            answers = answers_of(found, self.columns.suffix, place)
            row, name = self._image_row(found, place)
            rows_seen.update(f"{name!r} {self.images.index.lengths[row]} {question!r} {answers!r}\n".encode())
            return len(answers), key_of(name.encode(), question.encode())

        self.index = index_lines(captions, examine, faults)
        self.skipped = tuple(faults.skipped)
        self.content = fingerprint_of(["muge", rows_seen.hexdigest()])
        self.fingerprint = fingerprint_of(
            ["muge", captions.identity, self.images.index.file.identity, asdict(settings)]
        )

    def picture(self, found: dict[str, Any], place: str) -> Picture:
        return self.images.picture(*self._image_row(found, place))

    def _image_row(self, found: dict[str, Any], place: str) -> tuple[int, str]:
        name = image_id(value_of(found, self.columns.image, place), place)
        row = self.images.find(name)
        if row is None:
            raise DataError(f"{place}: the image id {name} is not in {self.images.path}.")
        return row, name


def image_id(value: Any, place: str) -> str:
    """An id as the table writes it. MUGE's captions hold it as a text or as a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{place}: an image id was expected, found {kind_of(value)}.")
    check_letters(str(value), IMAGE_ID, place)
    return str(value)


def find_image_table(captions: Path, given: str | None) -> Path:
    """The TSV with the images of a caption file.

    It is the file that the settings name; else, in the captions' folder or the folder that the settings name: the TSV
    of the captions' own name (train.tsv, train_imgs.tsv, … for train.jsonl), the only one of the same split
    (MR_train_imgs.tsv for train_texts.jsonl), or the only one at all, unless its name speaks of another split.
    """
    folder = captions.parent
    if given is not None:
        found = find_companion(given, folder)
        if not found.is_dir():
            return found
        folder = found
    tables = sorted(folder.glob("*.tsv"))
    own_names = [captions.stem + suffix for suffix in SUFFIXES]
    split = split_named(captions.stem)
    of_split = [table for table in tables if split is not None and split_named(table.stem) == split]
    of_none = [table for table in tables if split_named(table.stem) is None or split is None]
    for choice in ([table for table in tables if table.stem == own] for own in own_names):
        if choice:
            return choice[0]
    for choice in (of_split, of_none):
        if len(choice) == 1:
            return choice[0]
    raise DataError(
        f"{captions}: no image table for these captions. Looked in {folder} for "
        f"{', '.join(name + '.tsv' for name in own_names)} and for a single *.tsv of the same split; found "
        f"{', '.join(table.name for table in tables) or 'no *.tsv'}. Name it with data.images."
    )
