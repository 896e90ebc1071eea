"""How a data set is read: the `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

READERS = ("auto", "jsonl", "muge", "coco", "table")
FORMS = ("counting", "detection")
ANSWERS = ("first", "each")

COUNTING_QUESTION = (
    "How many of each type of {what} ({classes}) are there? Respond in JSON format with the {what} type as the key "
    "and an integer count as the value."
)
"""After the question of Roboflow's Moondream2 guide, where `what` is "the currency"."""


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from and which columns are what.

    reader: the layout; `auto` looks at the files. images: folder of the image files, or MUGE's image TSV, where it is
    not found beside the annotations. split: of a Hub data set. image_column, prefix_column, suffix_column: names in
    JSONL and tables. answer: of a list of answers, train on the `first` or make a sample of `each`. form: what COCO
    annotations become, a `counting` question with a JSON answer or the `detection` of boxes. classes: the classes
    that are counted or detected, by default those of the file. question, what: the counting question.
    skip_bad: how many bad samples are skipped instead of ending the run.
    """

    reader: str = "auto"
    images: str | None = None
    split: str | None = None
    image_column: str = "image"
    prefix_column: str | None = None
    suffix_column: str | None = None
    answer: str = "first"
    form: str = "counting"
    classes: tuple[str, ...] | None = None
    question: str = COUNTING_QUESTION
    what: str = "object"
    skip_bad: int = 0
