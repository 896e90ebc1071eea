"""From the rows of a layout to samples: one a row or an answer for training, one a question for evaluation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from weightport.finetuning.data.samples import Objects, Picture, Sample


@dataclass(frozen=True)
class Entry:
    """One row of a data set. All its answers hold for the one picture and question; none where `objects` are it.
    `classes` and `history`: see `Sample`."""

    place: str
    picture: Picture | None
    prefix: str
    answers: tuple[str, ...]
    objects: Objects | None = None
    classes: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


class Source(Protocol):
    """The good rows of a data set, examined once and read on demand.

    answer_counts: int32 [rows], how many answers a row has. question_keys: int64 [rows], equal where two rows ask the
    same question about the same picture. picture_keys(tick): int64 [rows], equal where two rows are about the same
    picture by its bytes, and the same in every run; each picture is read for it, when it is asked for, and `tick` told
    how many have been (content_keys.py). each_answer: whether training by default
    takes every answer, of all rows or, bool [rows], of each.
    fingerprint: 64 hexadecimal digits that change with the files and with how they are read. content: 64 that change
    with what the rows say and with the names of their pictures, and stay where files are copied.
    """

    name: str
    skipped: tuple[str, ...]
    fingerprint: str
    content: str

    @property
    def each_answer(self) -> bool | np.ndarray: ...

    @property
    def answer_counts(self) -> np.ndarray: ...

    @property
    def question_keys(self) -> np.ndarray: ...

    def picture_keys(self, tick: Callable[[int], None]) -> np.ndarray: ...

    def entry(self, row: int) -> Entry: ...


class View(Protocol):
    """Which rows make a sample, and which answer of the first of them is trained on."""

    def __len__(self) -> int: ...

    def locate(self, index: int) -> tuple[Sequence[int], int]: ...


class EachRow:
    """A sample a row, with its first answer."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def locate(self, index: int) -> tuple[Sequence[int], int]:
        return (index,), 0


class EachAnswer:
    """A sample an answer: answer_counts [rows] gives their sum of samples, in the order of rows."""

    def __init__(self, answer_counts: np.ndarray) -> None:
        self.ends = np.cumsum(answer_counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> tuple[Sequence[int], int]:
        row = int(np.searchsorted(self.ends, index, side="right"))
        return (row,), index - int(self.ends[row - 1] if row else 0)


class Repeated:
    """Samples of another view, each as often as `indices`, int64 [samples], name it."""

    def __init__(self, view: View, indices: np.ndarray) -> None:
        self.view, self.indices = view, indices

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[Sequence[int], int]:
        return self.view.locate(int(self.indices[index]))


class EachQuestion:
    """A sample for all rows with the same key, in the order in which the keys first appear."""

    def __init__(self, question_keys: np.ndarray) -> None:
        self.rows = np.argsort(question_keys, kind="stable")
        arranged = question_keys[self.rows]
        starts = np.flatnonzero(np.r_[True, arranged[1:] != arranged[:-1]][: len(arranged)])
        ends = np.r_[starts[1:], len(arranged)][: len(starts)]
        order = np.argsort(self.rows[starts], kind="stable")
        self.starts, self.ends = starts[order], ends[order]

    def __len__(self) -> int:
        return len(self.starts)

    def locate(self, index: int) -> tuple[Sequence[int], int]:
        return self.rows[self.starts[index] : self.ends[index]].tolist(), 0


class EntrySamples:
    """The samples of a source as a view arranges them. It pickles, without open files."""

    def __init__(self, source: Source, view: View) -> None:
        self.source = source
        self.view = view

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.source.skipped

    @property
    def names(self) -> tuple[str, ...]:
        """The files, folders or ids that the samples are of."""
        return tuple(getattr(self.source, "names", (self.source.name,)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader took for granted."""
        return tuple(getattr(self.source, "notes", ()))

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with the files, with their images, and with how they are read."""
        return self.source.fingerprint

    @property
    def content(self) -> str:
        """64 hexadecimal digits that change with questions, answers and names of pictures, wherever the files are."""
        return self.source.content

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, index: int) -> Sample:
        position = operator.index(index)
        position += len(self) if position < 0 else 0
        if not 0 <= position < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples; there is no {index}")
        rows, answer = self.view.locate(position)
        entries = [self.source.entry(row) for row in rows]
        first = entries[0]
        return Sample(
            place=first.place,
            picture=first.picture,
            prefix=first.prefix,
            suffix=first.answers[answer] if first.answers else "",
            references=tuple(text for entry in entries for text in entry.answers),
            objects=first.objects,
            classes=first.classes,
            history=first.history,
        )


def arrange(source: Source, answer: str, grouped: bool) -> EntrySamples:
    """The view for evaluation (`grouped`) or, after the setting `answer`, the one for training."""
    if grouped:
        return EntrySamples(source, EachQuestion(source.question_keys))
    each = {"each": True, "first": False}.get(answer, source.each_answer)
    counts = np.where(each, source.answer_counts, 1)
    return EntrySamples(source, EachRow(len(counts)) if (counts == 1).all() else EachAnswer(counts))
