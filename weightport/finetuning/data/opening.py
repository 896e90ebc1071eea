"""Data sets at paths, ready for training or evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from weightport.errors import DataError, RecipeError, UsageError
from weightport.finetuning.data.class_folders import ClassFolders
from weightport.finetuning.data.coco_captions import open_coco
from weightport.finetuning.data.content_keys import PicturesRead
from weightport.finetuning.data.entries import EntrySamples, Repeated, Source, arrange
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.joined import JoinedSources, hold_out, repetitions
from weightport.finetuning.data.muge import open_muge
from weightport.finetuning.data.patterns import has_pattern
from weightport.finetuning.data.recognition import recognise
from weightport.finetuning.data.record_files import open_records
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.tables import TableRows
from weightport.finetuning.data.tars import TarRows

SOURCES: dict[str, Callable[[str, DataSettings], Source]] = {
    "jsonl": lambda path, settings: open_records(Path(path), settings, "jsonl"),
    "json": lambda path, settings: open_records(Path(path), settings, "json"),
    "csv": lambda path, settings: open_records(Path(path), settings, "csv"),
    "muge": lambda path, settings: open_muge(Path(path), settings),
    "coco": lambda path, settings: open_coco(PinnedFile(Path(path)), settings),
    "folders": lambda path, settings: ClassFolders(Path(path), settings),
    "tar": lambda path, settings: TarRows(Path(path), settings),
    "table": TableRows,
}
"""What reads a layout that `recognise` found."""

Paths = str | Path | Sequence[str | Path]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def open_data(paths: Paths, settings: DataSettings, *, grouped: bool = False) -> EntrySamples:
    """Opens the data set at a file, folder, pattern of files, or Hub id, or several of them as one.

    `grouped` gives a sample for each question about an image, with all its references, for evaluation; without it a
    sample is what one step trains on, as often as `settings.weights` say. All annotations are read once and checked,
    and that every image is there; no picture is decoded and nothing is kept but arrays of places. What
    `settings.eval_fraction` says is left to `open_divided`.

    Raises DataError naming file and line for what is wrong, beyond the `skip_bad` samples that may be left out, and
    for a path that holds no data set that is known. `path:split` says the split with the path.
    """
    groups = [_sources(str(path), settings) for path in _listed(paths)]
    source = _joined(groups, settings)
    if grouped:
        return arrange(source, settings.answer, grouped=True)
    return _weighted(source, groups, np.arange(len(source.answer_counts)), settings)


def open_divided(
    paths: Paths, settings: DataSettings, fraction: float, say: Callable[[str], None] = lambda line: None
) -> tuple[EntrySamples, EntrySamples]:
    """(what to train on, what to measure on) of the data at `paths`: the share `fraction` of the pictures is held out.
    The stored bytes of every picture are read once to choose; `say` gets a line now and then while that goes on.
    Raises as `open_data`, and where nothing would be left."""
    groups = [_sources(str(path), settings) for path in _listed(paths)]
    source = _joined(groups, settings)
    training, evaluation = hold_out(source, fraction, PicturesRead(len(source.answer_counts), say))
    return (
        _weighted(training, groups, training.rows, settings),
        arrange(evaluation, settings.answer, grouped=True),
    )


def _sources(path: str, settings: DataSettings) -> list[Source]:
    """The sources at a path. Raises DataError for one that holds no samples."""
    if found := _URL.match(path):
        raise UsageError(
            f"{path} is a URL ({found[0]}). A file, a folder or a Hub id owner/name was expected: download it first."
        )
    place, split = split_path(path)
    settings = settings if split is None else replace(settings, split=split)
    sources = []
    for layout in recognise(place, settings):
        source = SOURCES[layout.reader](layout.path, settings)
        if not len(source.answer_counts):
            left_out = "".join(f"\n  {reason}" for reason in source.skipped[:5])
            raise DataError(f"{source.name} has no samples." + (f" Skipped:{left_out}" if left_out else ""))
        sources.append(source)
    return sources


def _joined(groups: list[list[Source]], settings: DataSettings) -> Source:
    sources = [source for group in groups for source in group]
    return sources[0] if len(sources) == 1 else JoinedSources(sources, settings.skip_bad)


def _weighted(source: Source, groups: list[list[Source]], rows: np.ndarray, settings: DataSettings) -> EntrySamples:
    """The samples to train on. `rows`, int64: which row of all groups each row of the source is."""
    samples = arrange(source, settings.answer, grouped=False)
    weights = settings.weights
    if weights is None:
        return samples
    if len(weights) != len(groups):
        raise RecipeError(f"data.weights has {len(weights)} numbers for {len(groups)} data sets (--data).")
    ends = np.cumsum([sum(len(each.answer_counts) for each in group) for group in groups])
    of_row = np.array(weights)[np.searchsorted(ends, rows, side="right")]
    first = np.array([samples.view.locate(index)[0][0] for index in range(len(samples))], dtype=np.int64)
    indices = repetitions(of_row[first], source.question_keys[first])
    if not len(indices):
        raise DataError(f"{source.name}: data.weights leave no sample to train on.")
    return EntrySamples(source, Repeated(samples.view, indices))


def _listed(paths: Paths) -> list[str | Path]:
    found = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not found:
        raise UsageError("No data set was given.")
    return found


def local_places(paths: Paths) -> list[Path]:
    """The files or folders that `open_data` would look at: without the split, and of a pattern the folder above it."""
    return [_local_place(str(path)) for path in _listed(paths)]


def _local_place(path: str) -> Path:
    place = Path(os.path.expanduser(split_path(path)[0]))
    while has_pattern(str(place)):
        place = place.parent
    return place


def split_path(path: str) -> tuple[str, str | None]:
    """A path, and the split behind its colon (owner/name:validation) unless a file has that very name."""
    place, colon, split = path.rpartition(":")
    if not (colon and place and split) or os.sep in split or os.path.exists(os.path.expanduser(path)):
        return path, None
    return place, split
