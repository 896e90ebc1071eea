"""JSON lines, JSON lists and CSV with the images in folders: the layout of the PaliGemma 2 guide, and others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weightport.errors import DataError
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.image_folder import find_image_folder
from weightport.finetuning.data.record_rows import RecordRows
from weightport.finetuning.data.records import JsonLines, JsonList, RecordFormat, csv_format, first_record
from weightport.finetuning.data.rows import row_reader
from weightport.finetuning.data.settings import DataSettings

LAYOUTS: dict[str, Callable[[PinnedFile], RecordFormat]] = {
    "jsonl": lambda file: JsonLines(),
    "json": lambda file: JsonList(),
    "csv": csv_format,
}
"""How a file of records is cut, by reader."""


def open_records(path: Path, settings: DataSettings, reader: str) -> RecordRows:
    """A file of records that name their pictures. `suffix` is a text or a list of accepted texts; `prefix` may be left
    out; or there are chats."""
    file = PinnedFile(path)
    layout = LAYOUTS[reader](file)
    first = first_record(file, layout)
    read = row_reader(first, settings, str(path))
    try:
        image = next((row.image for row in read(first, str(path))), None)
    except DataError:
        # What is wrong with it is said, with its line, when all records are looked at.
        image = None
    images = find_image_folder(settings.images, path, image)
    return RecordRows(file, settings, layout, read, images, kind=reader)
