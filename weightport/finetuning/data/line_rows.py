"""What the layouts with one JSON object a line have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from weightport.finetuning.data.columns import Columns, answers_of, parse_object, question_of
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.files import Line, LineIndex
from weightport.finetuning.data.samples import Picture


class LineRows(ABC):
    """Rows read again by the offsets of their lines. A layout sets the fields when it opens and finds the pictures."""

    name: str
    columns: Columns
    index: LineIndex

    @property
    def answer_counts(self) -> np.ndarray:
        return self.index.counts

    @property
    def question_keys(self) -> np.ndarray:
        return self.index.keys

    def entry(self, row: int) -> Entry:
        line = self.index.line(row)
        place = self.place_of(line)
        found = parse_object(line.content, place)
        return Entry(
            place,
            self.picture(found, place),
            question_of(found, self.columns.prefix, place),
            answers_of(found, self.columns.suffix, place),
        )

    @abstractmethod
    def picture(self, found: dict[str, Any], place: str) -> Picture:
        """The picture of the row `found`, not read. Raises DataError, naming `place`."""

    def place_of(self, line: Line) -> str:
        """The file and the number of the line, for messages."""
        return f"{self.name}, line {line.number}"
