"""How a data set is read: the `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightport.errors import RecipeError

READERS = ("auto", "jsonl", "json", "csv", "muge", "coco", "folders", "tar", "table")
TURNS = ("history", "alone")
FORMS = ("counting", "detection")
ANSWERS = ("auto", "first", "each")

COUNTING_QUESTION = (
    "How many of each type of {what} ({classes}) are there? Respond in JSON format with the {what} type as the key "
    "and an integer count as the value."
)
"""After the question of Roboflow's Moondream2 guide, where `what` is "the currency"."""


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from and which columns are what. Raises RecipeError for a value that no reader knows.

    reader: the layout; `auto` looks at the files.
    images: folders of the image files, or MUGE's image TSV, where it is not found beside the annotations. Paths as
        seen from the working directory or, where there is none, from the annotations' folder. Names are looked for in
        each; absolute names and symbolic links may lead into any of them, with "/" everywhere. A folder of several
        TSVs serves training and evaluation: the table is found in it by the captions' name.
    split: which part of a folder with several, or of a Hub data set; `val`, `valid`, `validation` and `dev` are one.
    subset, revision: the configuration of a Hub data set and the commit, tag or branch to read.
    image_column, prefix_column, suffix_column: names in JSONL and tables, by default the first known one that is there
        (columns.py).
    answer: of a list of answers, train on the `first` or make a sample of `each`; `auto` is each of MUGE's captions
        and the first elsewhere.
    turns: what an answer of a chat is asked with, the `history` before it or its question `alone`.
    drop_system: leave out the system messages of chats, which no prompt here holds, instead of refusing them.
    text_only: rows without a picture are taken, as text alone.
    weights: how often an epoch takes each of several data sets, one number each: 2 twice, 0.5 half of its samples,
        always the same ones. Evaluation takes each sample once.
    eval_fraction: share of the training data that is measured on instead, chosen picture by picture by a digest of its
        bytes (of text alone, of the text): neither other names nor rows that are added move any.
    draft: decode a JPEG for training at the smallest of 1, 1/2, 1/4 and 1/8 of its size whose sides have this many
        pixels: faster, and not quite the same picture (docs/finetuning.md).
    form: what COCO annotations become, a `counting` question with a JSON answer or the `detection` of boxes.
    classes: the classes that are counted or detected, in this order; by default all that the file names.
    question, what: the counting question; `{what}` and `{classes}` are filled in.
    skip_bad: how many bad samples are skipped instead of ending the run.
    """

    reader: str = "auto"
    images: tuple[str, ...] | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    image_column: str | None = None
    prefix_column: str | None = None
    suffix_column: str | None = None
    answer: str = "auto"
    turns: str = "history"
    drop_system: bool = False
    text_only: bool = False
    weights: tuple[float, ...] | None = None
    eval_fraction: float | None = None
    draft: int | None = None
    form: str = "counting"
    classes: tuple[str, ...] | None = None
    question: str = COUNTING_QUESTION
    what: str = "object"
    skip_bad: int = 0

    def __post_init__(self) -> None:
        for field, known in (("reader", READERS), ("form", FORMS), ("answer", ANSWERS), ("turns", TURNS)):
            value = getattr(self, field)
            if value not in known:
                raise RecipeError(f"data.{field} is {value!r}. It is one of {', '.join(known)}.")
        if self.classes is not None:
            object.__setattr__(self, "classes", _class_names(self.classes))
        if isinstance(self.images, str):
            object.__setattr__(self, "images", (self.images,))
        if self.weights is not None:
            object.__setattr__(self, "weights", _weights(self.weights))
        if self.eval_fraction is not None and not (_is_number(self.eval_fraction) and 0 < self.eval_fraction < 1):
            raise RecipeError(
                f"data.eval_fraction is {self.eval_fraction!r}. It is a share between 0 and 1, such as 0.05: neither "
                "none nor all of the data can be measured on."
            )
        if self.draft is not None and (
            isinstance(self.draft, bool) or not isinstance(self.draft, int) or self.draft < 1
        ):
            raise RecipeError(f"data.draft is {self.draft!r}. It is a number of pixels, such as batch.image_size.")
        if isinstance(self.skip_bad, bool) or not isinstance(self.skip_bad, int) or self.skip_bad < 0:
            raise RecipeError(f"data.skip_bad is {self.skip_bad!r}. It is a number of samples, 0 or more.")
        if not self.question.strip():
            raise RecipeError("data.question is empty. It is the question that counts are the answer to.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _weights(given: Any) -> tuple[float, ...]:
    try:
        found = tuple(float(each) for each in (given if isinstance(given, (list, tuple)) else [given]))
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 < each < float("inf") for each in found):
        raise RecipeError(f"data.weights is {given!r}. It is a list of numbers above 0, one for each --data.")
    return found


def _class_names(given: object) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise RecipeError(f"data.classes is {given!r}. It is a list of names, each once.")
    return names
