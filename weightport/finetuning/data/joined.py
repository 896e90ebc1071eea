"""Several data sets as one, and parts of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.content_keys import Tick
from weightport.finetuning.data.entries import Entry, Source
from weightport.finetuning.data.hashing import fingerprint_of, shares_of

SHOWN = 3
"""Data sets whose names stand in messages."""

HELD_OUT, REPEATED = 1, 2
"""Salts: which pictures are held out says nothing of which samples a weight takes."""


class JoinedSources:
    """The rows of several sources, one source behind the other. Keys of questions and pictures' names are told apart
    by their source; the same picture in two of them is one when data are divided."""

    def __init__(self, sources: Sequence[Source], skip_bad: int) -> None:
        self.sources = tuple(sources)
        self.ends = np.cumsum([len(source.answer_counts) for source in sources], dtype=np.int64)
        self.names = tuple(source.name for source in sources)
        self.name = ", ".join(self.names[:SHOWN]) + (
            f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
        )
        self.each_answer = np.concatenate(
            [np.broadcast_to(source.each_answer, len(source.answer_counts)) for source in sources]
        )
        self.notes = tuple(note for source in sources for note in getattr(source, "notes", ()))
        self.skipped = tuple(reason for source in sources for reason in source.skipped)
        if len(self.skipped) > skip_bad:
            raise DataError(
                f"More bad samples than the {skip_bad} that --skip-bad allows, in all data sets together: "
                f"{self.skipped[0]}"
            )
        self.answer_counts = np.concatenate([source.answer_counts for source in sources])
        self.question_keys = np.concatenate(
            [source.question_keys + np.int64(number << 40) for number, source in enumerate(sources)]
        )
        self.fingerprint = fingerprint_of(["joined", *(source.fingerprint for source in sources)])
        self.content = fingerprint_of(["joined", *(source.content for source in sources)])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        return np.concatenate([source.picture_keys(tick) for source in self.sources])

    def entry(self, row: int) -> Entry:
        number = int(np.searchsorted(self.ends, row, side="right"))
        begin = int(self.ends[number - 1]) if number else 0
        entry = self.sources[number].entry(row - begin)
        if entry.picture is None or not number:
            return entry
        # Features of pictures are kept by name.
        return replace(entry, picture=replace(entry.picture, key=f"{number + 1}:{entry.picture.key}"))


class ChosenRows:
    """Some rows of a source: `rows` int64. `part` names them in fingerprints."""

    def __init__(self, source: Source, rows: np.ndarray, part: str) -> None:
        self.source, self.rows = source, rows
        self.name, self.skipped = source.name, source.skipped
        self.names = tuple(getattr(source, "names", (source.name,)))
        self.notes = tuple(getattr(source, "notes", ()))
        self.each_answer = np.broadcast_to(source.each_answer, len(source.answer_counts))[rows]
        self.answer_counts = source.answer_counts[rows]
        self.question_keys = source.question_keys[rows]
        self.fingerprint = fingerprint_of([part, source.fingerprint])
        # Which rows they are follows from the bytes of pictures, which the source's content does not tell.
        self.content = fingerprint_of([part, source.content, hashlib.sha256(rows.tobytes()).hexdigest()])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        return self.source.picture_keys(tick)[self.rows]

    def entry(self, row: int) -> Entry:
        return self.source.entry(int(self.rows[row]))


def hold_out(source: Source, fraction: float, tick: Tick) -> tuple[ChosenRows, ChosenRows]:
    """(the rows to train on, those to measure on): `fraction` of the pictures, with all that is asked about them,
    chosen by their bytes alone; `tick` is told of those that have been read. Raises DataError where one of the two
    would be empty."""
    held = shares_of(source.picture_keys(tick), HELD_OUT) < fraction
    if held.all() or not held.any():
        raise DataError(
            f"{source.name}: data.eval_fraction={fraction:g} of {len(held):,} rows leaves none to "
            f"{'train' if held.all() else 'measure'} on. Choose another share, or give --eval-data."
        )
    training, evaluation = (np.flatnonzero(rows) for rows in (~held, held))
    return (
        ChosenRows(source, training, f"without {fraction!r}"),
        ChosenRows(source, evaluation, f"held out {fraction!r}"),
    )


def repetitions(weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Indices of samples, each as often as its weight says, in order: int64. `weights` float64 and `keys` int64 are
    those of the samples; a weight's fraction takes the samples whose keys say so."""
    whole = np.floor(weights)
    counts = whole + (shares_of(keys, REPEATED) < weights - whole)
    return np.repeat(np.arange(len(weights), dtype=np.int64), counts.astype(np.int64))
