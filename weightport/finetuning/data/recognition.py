"""Which layout a path holds, found by looking at the files."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from weightport.errors import DataError, MissingDataError
from weightport.finetuning.data.columns import IMAGE_NAMES
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.json_lines import first_object
from weightport.finetuning.data.muge import IMAGE_ID
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.splits import is_of_split, named_splits, names_split, no_split, split_named

LINES = (".jsonl", ".ndjson", ".jsonlines")
HEAD = 2**16
"""Bytes of a .json file that are looked at to tell JSON lines from one document."""

FOLDER_PATTERNS = (
    ("table", "state.json", "a folder of datasets' save_to_disk"),
    ("table", "dataset_dict.json", ""),
    ("jsonl", "annotations.jsonl", "annotations.jsonl or another *.jsonl"),
    ("jsonl", "metadata.jsonl", ""),
    ("jsonl", "*.jsonl", ""),
    ("coco", "_annotations.coco.json", "_annotations.coco.json, annotations.json or instances_*.json"),
    ("coco", "*.coco.json", ""),
    ("coco", "annotations.json", ""),
    ("coco", "instances_*.json", ""),
    ("coco", "annotations/instances_*.json", ""),
    ("table", "*.parquet", "*.parquet"),
    ("table", "data/*.parquet", ""),
)
"""What is looked for in a folder, in this order: the reader, the files, and how they are named to a user."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Layout:
    """A reader and the file, folder, pattern or Hub id that it reads."""

    reader: str
    path: str


def recognise(path: str, settings: DataSettings) -> Layout:
    """The layout at a path. Raises DataError saying what was looked for and what was found."""
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        try:
            return _in_folder_or_splits(place, settings)
        except OSError as error:
            raise DataError(f"{place} cannot be looked into: {error.strerror}.") from error
    if place.exists():
        if settings.split is not None and not is_of_split(place, settings.split):
            raise no_split(place, settings.split, named_splits([place]))
        return _of_file(place, settings.reader)
    if glob.has_magic(path) and settings.reader in ("auto", "table"):
        return Layout("table", path)
    if settings.reader == "table" or (settings.reader == "auto" and _may_be_hub_id(path)):
        return Layout("table", path)
    raise MissingDataError(
        f"{path} does not exist. A file or folder with a data set was expected, or a Hub id owner/name."
    )


def _may_be_hub_id(path: str) -> bool:
    """A path whose first folder exists is a slip of the pen, not a data set of the Hub."""
    return _HUB_ID.fullmatch(path) is not None and not os.path.exists(path.split("/")[0])


def _of_file(path: Path, reader: str) -> Layout:
    if reader != "auto":
        return Layout(reader, str(path))
    kind = path.suffix.lower()
    if kind == ".parquet":
        return Layout("table", str(path))
    if kind in LINES or (kind == ".json" and _is_json_lines(path)):
        return Layout(_reader_of_lines(path), str(path))
    if kind == ".json":
        return Layout("coco", str(path))
    hint = " This looks like a table of images: give the captions' JSONL, and this as data.images." * (kind == ".tsv")
    raise DataError(
        f"{path} is no data set that is known by its name. Looked for *.jsonl, COCO's *.json and *.parquet.{hint}"
    )


def _reader_of_lines(path: Path) -> str:
    """`muge` where lines name an image by id and not by file."""
    row = first_object(PinnedFile(path))
    return "muge" if IMAGE_ID in row and not any(name in row for name in IMAGE_NAMES) else "jsonl"


def _is_json_lines(path: Path) -> bool:
    """Whether the first line of a .json file is a whole object that is no COCO document."""
    file = PinnedFile(path)
    first, end, _ = file.read(0, min(file.size, HEAD)).lstrip().partition(b"\n")
    whole = first.rstrip().endswith(b"}") and (bool(end) or file.size <= HEAD)
    return whole and b'"annotations"' not in first


def _in_folder_or_splits(folder: Path, settings: DataSettings) -> Layout:
    found = _in_folder(folder, settings)
    if found is not None:
        return found
    wanted = settings.split
    named = sorted(inner for inner in folder.iterdir() if inner.is_dir() and split_named(inner.name))
    chosen = named
    if wanted is not None:
        chosen = [inner for inner in folder.iterdir() if inner.is_dir() and names_split(inner.name, wanted)]
    parts = {inner: layout for inner in chosen if (layout := _in_folder(inner, settings)) is not None}
    if len(parts) == 1:
        return next(iter(parts.values()))
    if parts:
        names = ", ".join(inner.name for inner in parts)
        problem = f"has the parts {names}" if wanted is None else f"has no one part {wanted}; found {names}"
        raise DataError(f"{folder} {problem}. Choose one with data.split, or give its folder.")
    others = [path for place in (folder, *named) for path in annotation_files(place, settings)]
    if wanted is not None and others:
        raise no_split(folder, wanted, named_splits(others))
    looked = [words for reader, _, words in FOLDER_PATTERNS if words and _allowed(reader, settings.reader)]
    inside = sorted(inner.name for inner in folder.iterdir())
    more = f" and {len(inside) - 10} more" if len(inside) > 10 else ""
    raise DataError(
        f"{folder}: no data set found here. Looked for {'; '.join(looked)}; and for these in folders train, valid, "
        f"test. Found: {', '.join(inside[:10]) or 'nothing'}{more}. A file of another name can be given itself."
    )


def _in_folder(folder: Path, settings: DataSettings) -> Layout | None:
    """The layout whose files, of the wanted split, lie in this folder itself, or None."""
    for reader, pattern, _ in FOLDER_PATTERNS:
        if not _allowed(reader, settings.reader):
            continue
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found and reader == "table":
            return Layout("table", str(folder))
        if settings.split is not None:
            found = [path for path in found if is_of_split(path, settings.split)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:10])
            raise DataError(f"{folder} has several annotation files: {names}. Give one of them, or data.split.")
        if found:
            return _of_file(found[0], settings.reader)
    return None


def annotation_files(folder: Path, settings: DataSettings) -> list[Path]:
    """The annotation files of every layout in this folder itself, whatever split they are of."""
    wanted = [pattern for reader, pattern, _ in FOLDER_PATTERNS if _allowed(reader, settings.reader)]
    return list(dict.fromkeys(path for pattern in wanted for path in sorted(folder.glob(pattern)) if path.is_file()))


def _allowed(reader: str, wanted: str) -> bool:
    return wanted in ("auto", reader) or (reader, wanted) == ("jsonl", "muge")
