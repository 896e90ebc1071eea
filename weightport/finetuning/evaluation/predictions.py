"""What a model answered, beside what it should have: the one thing that metrics and reports read."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.finetuning.data.samples import Objects


@dataclass(frozen=True)
class Prediction:
    """One answer. `index` is the sample's in its data set, `key` its picture's name.

    `text` is the decoded answer without special tokens, `references` the accepted ones. For detection, `found` are the
    boxes read from the answer and `expected` those of the data set.
    """

    index: int
    place: str
    key: str
    prompt: str
    text: str
    references: tuple[str, ...]
    found: Objects | None = None
    expected: Objects | None = None
