"""A data set at a path, ready for training or evaluation."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from weightport.errors import DataError
from weightport.finetuning.data.coco import CocoImages
from weightport.finetuning.data.entries import EntrySamples, Source, arrange
from weightport.finetuning.data.json_lines import JsonLines
from weightport.finetuning.data.muge import MugeCaptions
from weightport.finetuning.data.recognition import recognise
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.tables import TableRows

SOURCES: dict[str, Callable[[str, DataSettings], Source]] = {
    "jsonl": lambda path, settings: JsonLines(Path(path), settings),
    "muge": lambda path, settings: MugeCaptions(Path(path), settings),
    "coco": lambda path, settings: CocoImages(Path(path), settings),
    "table": TableRows,
}


def open_data(path: str | Path, settings: DataSettings, *, grouped: bool = False) -> EntrySamples:
    """Opens the data set at a file, folder, pattern of parquet files, or Hub id.

    `grouped` gives a sample for each question about an image, with all its references, for evaluation; without it a
    sample is what one step trains on. All annotations are read once and checked, and that every image is there; no
    picture is decoded and nothing is kept but arrays of places.

    Raises DataError naming file and line for what is wrong, beyond the `skip_bad` samples that may be left out, and
    for a path that holds no data set that is known. `path:split` says the split with the path.
    """
    place, split = split_path(str(path))
    settings = settings if split is None else replace(settings, split=split)
    layout = recognise(place, settings)
    source = SOURCES[layout.reader](layout.path, settings)
    if not len(source.answer_counts):
        left_out = "".join(f"\n  {reason}" for reason in source.skipped[:5])
        raise DataError(f"{source.name} has no samples." + (f" Skipped:{left_out}" if left_out else ""))
    return arrange(source, settings.answer, grouped)


def local_place(path: str) -> Path:
    """The file or folder that `open_data` would look at: without the split, and of a pattern the folder above it."""
    place = Path(os.path.expanduser(split_path(path)[0]))
    while glob.has_magic(str(place)):
        place = place.parent
    return place


def split_path(path: str) -> tuple[str, str | None]:
    """A path, and the split behind its colon (owner/name:validation) unless a file has that very name."""
    place, colon, split = path.rpartition(":")
    if not (colon and place and split) or os.sep in split or os.path.exists(os.path.expanduser(path)):
        return path, None
    return place, split
