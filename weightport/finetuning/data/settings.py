"""How a data set is read: the `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.errors import RecipeError

READERS = ("auto", "jsonl", "muge", "coco", "table")
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
    images: folder of the image files, or MUGE's image TSV, where it is not found beside the annotations. A path as
        seen from the working directory or, where there is none, from the annotations' folder. A folder of several
        TSVs serves training and evaluation: the table is found in it by the captions' name.
    split: which part of a folder with several, or of a Hub data set; `val`, `valid`, `validation` and `dev` are one.
    subset, revision: the configuration of a Hub data set and the commit, tag or branch to read.
    image_column, prefix_column, suffix_column: names in JSONL and tables, by default the first known one that is there
        (columns.py).
    answer: of a list of answers, train on the `first` or make a sample of `each`; `auto` is each of MUGE's captions
        and the first elsewhere.
    form: what COCO annotations become, a `counting` question with a JSON answer or the `detection` of boxes.
    classes: the classes that are counted or detected, in this order; by default all that the file names.
    question, what: the counting question; `{what}` and `{classes}` are filled in.
    skip_bad: how many bad samples are skipped instead of ending the run.
    """

    reader: str = "auto"
    images: str | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    image_column: str | None = None
    prefix_column: str | None = None
    suffix_column: str | None = None
    answer: str = "auto"
    form: str = "counting"
    classes: tuple[str, ...] | None = None
    question: str = COUNTING_QUESTION
    what: str = "object"
    skip_bad: int = 0

    def __post_init__(self) -> None:
        for field, known in (("reader", READERS), ("form", FORMS), ("answer", ANSWERS)):
            value = getattr(self, field)
            if value not in known:
                raise RecipeError(f"data.{field} is {value!r}. It is one of {', '.join(known)}.")
        if self.classes is not None:
            object.__setattr__(self, "classes", _class_names(self.classes))
        if isinstance(self.skip_bad, bool) or not isinstance(self.skip_bad, int) or self.skip_bad < 0:
            raise RecipeError(f"data.skip_bad is {self.skip_bad!r}. It is a number of samples, 0 or more.")
        if not self.question.strip():
            raise RecipeError("data.question is empty. It is the question that counts are the answer to.")


def _class_names(given: object) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise RecipeError(f"data.classes is {given!r}. It is a list of names, each once.")
    return names
