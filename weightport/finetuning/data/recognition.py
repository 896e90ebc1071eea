"""Which layout a path holds, found by looking at the files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightport.errors import DataError, MissingDataError
from weightport.finetuning.data.class_folders import are_class_folders, without_pictures
from weightport.finetuning.data.columns import IMAGE_NAMES, SUFFIX_NAMES
from weightport.finetuning.data.files import PinnedFile, no_file
from weightport.finetuning.data.image_table import IMAGE_ID
from weightport.finetuning.data.patterns import expand, has_braces, has_pattern
from weightport.finetuning.data.records import JsonLines, first_record, has_names
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.splits import is_of_split, named_splits, names_split, no_split, split_named

LINES = (".jsonl", ".ndjson", ".jsonlines")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")
HEAD = 2**16
"""Bytes of a .json file that are looked at to tell JSON lines, a list and one document apart."""

FOLDER_PATTERNS = (
    ("table", "state.json", "a folder of datasets' save_to_disk"),
    ("table", "dataset_dict.json", ""),
    ("jsonl", "annotations.jsonl", "annotations.jsonl, metadata.jsonl or another *.jsonl"),
    ("jsonl", "metadata.jsonl", ""),
    ("jsonl", "*.jsonl", ""),
    ("csv", "metadata.csv", "metadata.csv or another *.csv"),
    ("csv", "*.csv", ""),
    ("coco", "_annotations.coco.json", "_annotations.coco.json, annotations.json, instances_*.json, captions_*.json"),
    ("coco", "*.coco.json", ""),
    ("coco", "annotations.json", ""),
    ("coco", "instances_*.json", ""),
    ("coco", "annotations/instances_*.json", ""),
    ("coco", "captions_*.json", ""),
    ("tar", "*.tar", "*.tar"),
    ("table", "*.parquet", "*.parquet"),
    ("table", "data/*.parquet", ""),
)
"""What is looked for in a folder, in this order: the reader, the files, and how they are named to a user."""

CLASSES = "folders of pictures, a class each"


def _always(path: Path) -> bool:
    return True


def _names_images_by_id(path: Path) -> bool:
    """Whether lines name an image by id and not by file."""
    row = first_record(PinnedFile(path), JsonLines())
    return IMAGE_ID in row and not any(name in row for name in IMAGE_NAMES)


def _has_names(path: Path) -> bool:
    """Whether the first line of a .tsv file names columns: MUGE's tables of images have no names."""
    return has_names(path, (*IMAGE_NAMES, *SUFFIX_NAMES))


def _is_json_lines(path: Path) -> bool:
    """Whether the first line of a .json file is a whole object that is no COCO document."""
    file = PinnedFile(path)
    first, end, _ = _head(file).partition(b"\n")
    whole = first.startswith(b"{") and first.rstrip().endswith(b"}") and (bool(end) or file.size <= HEAD)
    return whole and b'"annotations"' not in first


def _is_list(path: Path) -> bool:
    return _head(PinnedFile(path)).startswith(b"[")


def _head(file: PinnedFile) -> bytes:
    return file.read(0, min(file.size, HEAD)).removeprefix(b"\xef\xbb\xbf").lstrip()


FILES: tuple[tuple[str, tuple[str, ...], Callable[[Path], bool]], ...] = (
    ("table", (".parquet",), _always),
    ("tar", (".tar",), _always),
    ("csv", (".csv",), _always),
    ("csv", (".tsv",), _has_names),
    ("muge", LINES, _names_images_by_id),
    ("jsonl", LINES, _always),
    ("json", (".json",), _is_list),
    ("muge", (".json",), lambda path: _is_json_lines(path) and _names_images_by_id(path)),
    ("jsonl", (".json",), _is_json_lines),
    ("coco", (".json",), _always),
)
"""What a file is: the reader, how names end, and what the file has to be; the first that fits."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Layout:
    """A reader and the file, folder, pattern or Hub id that it reads."""

    reader: str
    path: str


def recognise(path: str, settings: DataSettings) -> list[Layout]:
    """The layouts at a path, several for a pattern and for a folder of shards. Raises DataError saying what was looked
    for and what was found."""
    if has_pattern(path):
        names = expand(path)
        if all(name.endswith(".parquet") for name in names) and not has_braces(path):
            # One table, whose columns are compared.
            return [Layout("table", path)]
        return [layout for name in names for layout in recognise(name, settings)]
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        try:
            return _in_folder_or_splits(place, settings)
        except OSError as error:
            raise DataError(f"{place} cannot be looked into: {error.strerror}.") from error
    if path == "-" or (place.exists() and not place.is_file()):
        raise no_file(path)
    if place.exists():
        if settings.split is not None and not is_of_split(place, settings.split):
            raise no_split(place, settings.split, named_splits([place]))
        return [_of_file(place, settings.reader)]
    if settings.reader == "table" or (settings.reader == "auto" and _may_be_hub_id(path)):
        return [Layout("table", path)]
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
    for found, endings, fits in FILES:
        if kind in endings and fits(path):
            return Layout(found, str(path))
    hint = ""
    if kind == ".tsv":
        hint = (
            " Its first line names no known column. Is it a table of images? Then give the captions' JSONL, and "
            "this as data.images."
        )
    if kind in COMPRESSED:
        hint = " It is compressed: unpack it, so that samples can be read where they stand."
    known = ", ".join(f"*{ending}" for ending in dict.fromkeys(each for _, endings, _ in FILES for each in endings))
    raise DataError(f"{path} is no data set that is known by its name. Looked for {known}.{hint}")


def _in_folder_or_splits(folder: Path, settings: DataSettings) -> list[Layout]:
    found = _in_folder(folder, settings)
    if found:
        return found
    wanted = settings.split
    named = sorted(inner for inner in folder.iterdir() if inner.is_dir() and split_named(inner.name))
    chosen = named
    if wanted is not None:
        chosen = [inner for inner in folder.iterdir() if inner.is_dir() and names_split(inner.name, wanted)]
    parts = {inner: layouts for inner in chosen if (layouts := _in_folder(inner, settings))}
    if len(parts) == 1:
        return next(iter(parts.values()))
    if parts:
        names = ", ".join(inner.name for inner in parts)
        problem = f"has the parts {names}" if wanted is None else f"has no one part {wanted}; found {names}"
        raise DataError(f"{folder} {problem}. Choose one with data.split, or give its folder.")
    others = [path for place in (folder, *named) for path in annotation_files(place, settings)]
    if wanted is not None and others:
        raise no_split(folder, wanted, named_splits(others))
    every = (*FOLDER_PATTERNS, ("folders", "", CLASSES))
    looked = [words for reader, _, words in every if words and _allowed(reader, settings.reader)]
    inside = sorted(inner.name for inner in folder.iterdir())
    more = f" and {len(inside) - 10} more" if len(inside) > 10 else ""
    raise DataError(
        f"{folder}: no data set found here. Looked for {'; '.join(looked)}; and for these in folders train, valid, "
        f"test. Found: {', '.join(inside[:10]) or 'nothing'}{more}. A file of another name can be given itself."
        f"{without_pictures(folder)}"
    )


def _in_folder(folder: Path, settings: DataSettings) -> list[Layout]:
    """The layout whose files, of the wanted split, lie in this folder itself, one of each shard; or nothing."""
    for reader, pattern, _ in FOLDER_PATTERNS:
        if not _allowed(reader, settings.reader):
            continue
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found and reader == "table":
            return [Layout("table", str(folder))]
        if settings.split is not None:
            found = [path for path in found if is_of_split(path, settings.split)]
        splits = {split_named(path.stem) for path in found}
        if len(found) > 1 and (reader != "tar" or len(splits) > 1):
            names = ", ".join(path.name for path in found[:10])
            raise DataError(f"{folder} has several annotation files: {names}. Give one of them, or data.split.")
        if found:
            return [_of_file(path, settings.reader) for path in found]
    of_split = settings.split is None or names_split(folder.absolute().name, settings.split)
    allowed = of_split and _allowed("folders", settings.reader)
    if allowed and are_class_folders(folder, asked_for=settings.reader == "folders"):
        return [Layout("folders", str(folder))]
    return []


def annotation_files(folder: Path, settings: DataSettings) -> list[Path]:
    """The annotation files of every layout in this folder itself, whatever split they are of."""
    wanted = [pattern for reader, pattern, _ in FOLDER_PATTERNS if _allowed(reader, settings.reader)]
    return list(dict.fromkeys(path for pattern in wanted for path in sorted(folder.glob(pattern)) if path.is_file()))


def _allowed(reader: str, wanted: str) -> bool:
    return wanted in ("auto", reader) or (reader, wanted) == ("jsonl", "muge")
