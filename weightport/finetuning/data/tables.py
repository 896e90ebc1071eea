"""Tables through `datasets`: local parquet, folders of `save_to_disk`, and data sets of the Hub, memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.columns import find_image_column
from weightport.finetuning.data.content_keys import Tick, keys_by_content, picture_key
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.hashing import fingerprint_of
from weightport.finetuning.data.image_folder import ImageFile, ImageFolder, find_image_folder
from weightport.finetuning.data.rows import ChatRows, ColumnRows, Row, RowReader, row_reader
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.table_opening import open_table

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
MOST_PARTS = 1024
"""Answers of a chat."""

_DIGESTED = 16
"""Rows whose pictures are in memory at once while their digests are taken."""


@dataclass(frozen=True)
class CellImage:
    """The image in a cell of a table, or the only one of its list: bytes, or the name of a file in `folder` (or in the
    cache of `datasets`)."""

    table: Dataset
    row: int
    column: str
    place: str
    folder: ImageFolder

    def __call__(self) -> bytes:
        cell = self.table[self.row][self.column]
        cell = cell[0] if isinstance(cell, list) else cell
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            return content
        return ImageFile(find_file(cell, self.folder, self.place))()


class TableRows:
    """The rows of a table with an image, and a text or a list of texts and perhaps a question, or a chat.

    Opening reads the texts once, and of the images only whether they are there.
    """

    each_answer = False

    def __init__(self, path: str, settings: DataSettings) -> None:
        self.name = path
        table = open_table(path, settings)
        self.reader, columns, self.image_column = _columns(table.column_names, settings, path)
        self.text_only = settings.text_only
        self.images = with_undecoded_images(table.select_columns([self.image_column]), self.image_column, path)
        self.texts = table.select_columns([name for name in columns if name != self.image_column])
        self.labels = {name: names for name in columns if (names := class_names(table, name)) is not None}
        self.folder = _folder_beside(path, settings)

        faults = Faults(settings.skip_bad)
        found: list[tuple[int, int, int]] = []
        rows_seen = hashlib.blake2b()
        for row, (cell, texts) in enumerate(zip(self._image_places(), self._all_texts())):
            place = self._place(row)
            try:
                read = self._read(texts, place)
                self._check_image(cell, place)
            except DataError as fault:
                faults.add(fault)
                continue
            name = os.path.basename(cell) if isinstance(cell, str) else cell
            for part, each in enumerate(read):
                found.append((row, part, len(each.answers)))
                history = f" {each.history!r}" if each.history else ""
                rows_seen.update(f"{name!r} {each.question!r} {each.answers!r}{history}\n".encode())
        table_rows = np.array(found, dtype=np.int64).reshape(-1, 3)
        self.rows, self.parts = table_rows[:, 0], table_rows[:, 1].astype(np.int32)
        self.answer_counts = table_rows[:, 2].astype(np.int32)
        self.skipped = tuple(faults.skipped)
        self.content = fingerprint_of(["table", rows_seen.hexdigest()])
        self.fingerprint = fingerprint_of(["table", path, _identity(table), asdict(settings)])

    @property
    def question_keys(self) -> np.ndarray:
        return self.rows * MOST_PARTS + self.parts

    def entry(self, row: int) -> Entry:
        position = int(self.rows[row])
        place = self._place(position)
        rows = self._read(self.texts[position], place)
        found = rows[int(self.parts[row])]
        image = CellImage(self.images, position, self.image_column, place, self.folder)
        picture = Picture(f"row {position + 1}", place, image) if self._has_image(position) else None
        place = f"{place}, answer {int(self.parts[row]) + 1}" if len(rows) > 1 else place
        return Entry(place, picture, found.question, found.answers, history=found.history)

    def _read(self, texts: dict[str, Any], place: str) -> Sequence[Row]:
        """The rows of a table's row, numbers of classes as their names."""
        named = {
            column: names[value]
            for column, names in self.labels.items()
            if isinstance(value := texts.get(column), int) and 0 <= value < len(names)
        }
        rows = self.reader({**texts, **named}, place)
        if len(rows) > MOST_PARTS:
            raise DataError(f"{place}: a chat of {len(rows):,} answers. Up to {MOST_PARTS:,} were expected.")
        return rows

    def _has_image(self, position: int) -> bool:
        return not self.text_only or self.images[position][self.image_column] not in (None, [])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        """Bytes in the table are read in its order, in batches; pictures in files, and texts, by row."""
        keys = np.zeros(len(self.images), dtype=np.int64)
        held = np.zeros(len(self.images), dtype=bool)
        begin = 0
        for batch in self.images.with_format("arrow").iter(batch_size=_DIGESTED):
            cells = batch.column(self.image_column).to_pylist()
            for row, content in enumerate(map(_bytes_in, cells), start=begin):
                if content:
                    keys[row], held[row] = picture_key(content), True
            tick(int(held[begin : begin + len(cells)].sum()))
            begin += len(cells)
        found, others = keys[self.rows], np.flatnonzero(~held[self.rows])
        found[others] = keys_by_content(others, lambda number: self.entry(int(others[number])), tick)
        return found

    def _place(self, row: int) -> str:
        return f"{self.name}, row {row + 1}"

    def _all_texts(self) -> Iterator[dict[str, Any]]:
        for batch in self.texts.with_format("arrow").iter(batch_size=_BATCH):
            yield from batch.to_pylist()

    def _image_places(self) -> Iterator[bool | str | int | None]:
        """Of each row, True where its image's bytes are in the table, else the path of the image, else None; of a list
        of several images, how many."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for batch in self.images.with_format("arrow").iter(batch_size=_BATCH):
            cells, held = batch.column(self.image_column), None
            if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
                held = pc.list_value_length(cells).to_pylist()
                cells = pc.list_flatten(cells)
            nothing = [None] * len(cells)
            if pa.types.is_struct(cells.type):
                lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
                paths = pc.struct_field(cells, "path").to_pylist()
            elif pa.types.is_string(cells.type):
                lengths, paths = nothing, cells.to_pylist()
            else:
                lengths, paths = pc.binary_length(cells).to_pylist(), nothing
            found = iter([True if length else path for length, path in zip(lengths, paths)])
            if held is None:
                yield from found
                continue
            for count in held:
                listed = [next(found) for _ in range(count or 0)]
                yield listed[0] if len(listed) == 1 else len(listed) or None

    def _check_image(self, cell: bool | str | int | None, place: str) -> None:
        if cell is None and self.text_only:
            return
        if not isinstance(cell, bool) and isinstance(cell, int):
            raise DataError(f"{place}: {cell} pictures. One a sample was expected.")
        if cell is None:
            raise DataError(f"{place}: {self.image_column!r} holds no image.")
        if isinstance(cell, str):
            find_file(cell, self.folder, place)


def _columns(names: Sequence[str], settings: DataSettings, place: str) -> tuple[RowReader, list[str], str]:
    """(what reads the texts of a row, the columns that it needs, the column of the image)."""
    reader = row_reader(names, replace(settings, text_only=False), place)
    if isinstance(reader, ChatRows):
        image = find_image_column(names, settings, place)
        return replace(reader, images=(), needs_image=False), [reader.messages], image
    assert isinstance(reader, ColumnRows)
    columns = reader.columns
    needed = [name for name in (columns.prefix, columns.suffix) if name is not None]
    return ColumnRows(replace(columns, image=None), text_only=True), needed, str(columns.image)


def _bytes_in(cell: Any) -> bytes | None:
    """The bytes that a cell holds, None where it names a file or holds nothing."""
    cell = cell[0] if isinstance(cell, list) and cell else cell
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def class_names(table: Dataset, column: str) -> list[str] | None:
    """The names that the numbers of a column stand for, None for other columns."""
    names = getattr(table.features[column], "names", None)
    return None if names is None else [str(name) for name in names]


def with_undecoded_images(table: Dataset, column: str, place: str) -> Dataset:
    """The table with its images as they are stored. Raises DataError for a column that holds no images."""
    import pyarrow as pa
    from datasets import Image, List

    feature = table.features[column]
    if isinstance(feature, Image):
        return table.cast_column(column, Image(decode=False))
    kind = table.data.schema.field(column).type
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return table.cast_column(column, List(Image(decode=False)))
    whole = kind
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return table
    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string)):
        return table
    raise DataError(
        f"{place}: the column {column!r} holds {whole}. Images were expected: bytes, names of files, or "
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
