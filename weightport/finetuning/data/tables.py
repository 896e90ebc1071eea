"""Tables through `datasets`: local parquet, folders of `save_to_disk`, and data sets of the Hub, memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.columns import answers_of, find_columns, question_of
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import ImageFile, ImageFolder, find_image_folder
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.table_opening import open_table

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
_DIGESTED = 16
"""Rows whose pictures are in memory at once while their digests are taken."""


@dataclass(frozen=True)
class CellImage:
    """The image in a cell of a table: bytes, or the name of a file in `folder` (or in the cache of `datasets`)."""

    table: Dataset
    row: int
    column: str
    place: str
    folder: ImageFolder

    def __call__(self) -> bytes:
        cell = self.table[self.row][self.column]
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            return content
        return ImageFile(find_file(cell, self.folder, self.place))()


class TableRows:
    """The rows of a table with an image, a text or a list of texts, and perhaps a question.

    Opening reads the texts once, and of the images only whether they are there.
    """

    each_answer = False

    def __init__(self, path: str, settings: DataSettings) -> None:
        self.name = path
        table = open_table(path, settings)
        self.columns = find_columns(table.column_names, settings, path)
        self.image_column = str(self.columns.image)
        self.images = with_undecoded_images(table.select_columns([self.image_column]), self.image_column, path)
        self.texts = table.select_columns([name for name in self.columns.all if name != self.image_column])
        self.labels = class_names(table, self.columns.suffix)
        self.folder = _folder_beside(path, settings)

        faults = Faults(settings.skip_bad)
        rows, counts, rows_seen = [], [], hashlib.blake2b()
        for row, (cell, texts) in enumerate(zip(self._image_places(), self._all_texts())):
            place = self._place(row)
            try:
                answers = self._answers(texts, place)
                question = question_of(texts, self.columns.prefix, place)
                self._check_image(cell, place)
            except DataError as fault:
                faults.add(fault)
                continue
            rows.append(row)
            counts.append(len(answers))
            name = os.path.basename(cell) if isinstance(cell, str) else cell
            rows_seen.update(f"{name!r} {question!r} {answers!r}\n".encode())
        self.rows = np.array(rows, dtype=np.int64)
        self.answer_counts = np.array(counts, dtype=np.int32)
        self.skipped = tuple(faults.skipped)
        self.content = fingerprint_of(["table", rows_seen.hexdigest()])
        self.fingerprint = fingerprint_of(["table", path, _identity(table), asdict(settings)])

    @property
    def question_keys(self) -> np.ndarray:
        return self.rows

    def entry(self, row: int) -> Entry:
        position = int(self.rows[row])
        place = self._place(position)
        texts = self.texts[position]
        image = CellImage(self.images, position, self.image_column, place, self.folder)
        return Entry(
            place,
            Picture(f"row {position + 1}", place, image),
            question_of(texts, self.columns.prefix, place),
            self._answers(texts, place),
        )

    def _answers(self, texts: dict[str, Any], place: str) -> tuple[str, ...]:
        value = texts.get(self.columns.suffix)
        if self.labels is not None and isinstance(value, int) and 0 <= value < len(self.labels):
            return (self.labels[value],)
        return answers_of(texts, self.columns.suffix, place)

    def picture_keys(self) -> np.ndarray:
        """By the bytes of the pictures, all of which are read: tables seldom name them."""
        keys = []
        for batch in self.images.with_format("arrow").iter(batch_size=_DIGESTED):
            keys += [_picture_key(cell) for cell in batch.column(self.image_column).to_pylist()]
        return np.array(keys, dtype=np.int64)[self.rows]

    def _place(self, row: int) -> str:
        return f"{self.name}, row {row + 1}"

    def _all_texts(self) -> Iterator[dict[str, Any]]:
        for batch in self.texts.with_format("arrow").iter(batch_size=_BATCH):
            yield from batch.to_pylist()

    def _image_places(self) -> Iterator[bool | str | None]:
        """Of each row, True where its image's bytes are in the table, else the path of the image, else None."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for batch in self.images.with_format("arrow").iter(batch_size=_BATCH):
            cells = batch.column(self.image_column)
            nothing = [None] * len(cells)
            if pa.types.is_struct(cells.type):
                lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
                paths = pc.struct_field(cells, "path").to_pylist()
            elif pa.types.is_string(cells.type):
                lengths, paths = nothing, cells.to_pylist()
            else:
                lengths, paths = pc.binary_length(cells).to_pylist(), nothing
            yield from (True if length else path for length, path in zip(lengths, paths))

    def _check_image(self, cell: bool | str | None, place: str) -> None:
        if cell is None:
            raise DataError(f"{place}: {self.image_column!r} holds no image.")
        if isinstance(cell, str):
            find_file(cell, self.folder, place)


def _picture_key(cell: Any) -> int:
    content = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    return key_of(os.path.basename(content).encode() if isinstance(content, str) else content or b"")


def class_names(table: Dataset, column: str) -> list[str] | None:
    """The names that the numbers of a column stand for, None for other columns."""
    names = getattr(table.features[column], "names", None)
    return None if names is None else [str(name) for name in names]


def with_undecoded_images(table: Dataset, column: str, place: str) -> Dataset:
    """The table with its images as they are stored. Raises DataError for a column that holds no images."""
    import pyarrow as pa
    from datasets import Image

    feature = table.features[column]
    if isinstance(feature, Image):
        return table.cast_column(column, Image(decode=False))
    kind = table.data.schema.field(column).type
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return table
    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string)):
        return table
    raise DataError(
        f"{place}: the column {column!r} holds {kind}. Images were expected: bytes, names of files, or "
        "{bytes, path}. Name another column with data.image_column."
    )


def find_file(cell: Any, folder: ImageFolder, place: str) -> str:
    """The file of a cell without bytes: its name is relative to the folder, or leads into the cache of `datasets`."""
    name = cell["path"] if isinstance(cell, dict) else cell
    if isinstance(name, str) and os.path.isabs(name):
        real = os.path.realpath(name)
        for cache in _caches():
            if os.path.commonpath((real, cache)) == cache and os.path.isfile(real):
                return real
    return folder.find(name, place)[0]


def _caches() -> list[str]:
    from datasets import config
    from huggingface_hub import constants

    places = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return [os.path.realpath(place) for place in places]


def _folder_beside(path: str, settings: DataSettings) -> ImageFolder:
    beside = Path(path) if os.path.isdir(path) else Path(path).parent
    return find_image_folder(settings.images, beside / "table", None)


def _identity(table: Dataset) -> list[object]:
    """Names, sizes and times of the mapped files, and the number of rows."""
    files = [file["filename"] for file in table.cache_files]
    stats = [os.stat(file) for file in files]
    return [table.num_rows, [(file, s.st_size, s.st_mtime_ns) for file, s in zip(files, stats)]]
