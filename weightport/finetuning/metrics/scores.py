"""What a metric is, what it gives, and the conditions on predictions that every metric shares."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import ModuleType

from weightport.errors import DataError, UsageError
from weightport.extras import install_command
from weightport.finetuning.evaluation.predictions import Prediction


@dataclass(frozen=True)
class Scores:
    """One metric on one set of predictions.

    `details` are further figures by name, distinct over all metrics. `per_sample` follows the order of the predictions
    and is None where a metric exists only for the whole set (BLEU, AP).
    """

    value: float
    details: Mapping[str, float] = field(default_factory=dict)
    per_sample: Sequence[float] | None = None


Scorer = Callable[[Sequence[Prediction]], Scores]


@dataclass(frozen=True)
class Metric:
    """A figure of merit of generated answers.

    `best` is what perfect answers can reach at most; `needs` is "text" (`text` and `references` of a prediction),
    "boxes" (`found` and `expected`) or "ranks" (of a model for retrieval, which answers nothing); `fewest` the number
    of samples below which the metric is undefined. `score` raises DataError when there are no predictions, or when a
    prediction has nothing to be held against.
    """

    name: str
    describe: str
    higher_is_better: bool
    best: float
    needs: str
    score: Scorer
    fewest: int = 1


def library(name: str) -> ModuleType:
    """The module `name` of the `finetune` extra. Raises UsageError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this metric needs {name.partition('.')[0]}, which is not installed: {install_command('finetune')}."
        ) from error


def on_text(score: Scorer) -> Scorer:
    """A metric of texts: every prediction has a reference that is not blank."""

    @wraps(score)
    def checked(predictions: Sequence[Prediction]) -> Scores:
        _require_any(predictions)
        for prediction in predictions:
            if not any(reference.strip() for reference in prediction.references):
                raise DataError(f"{prediction.place}: there is no reference answer to hold the prediction against.")
        return score(predictions)

    return checked


def on_boxes(score: Scorer) -> Scorer:
    """A metric of boxes: they were read from the answers, and at least one is expected somewhere."""

    @wraps(score)
    def checked(predictions: Sequence[Prediction]) -> Scores:
        _require_any(predictions)
        for prediction in predictions:
            if prediction.expected is None:
                raise DataError(
                    f"{prediction.place}: the data set gives no boxes. Metrics of boxes need COCO annotations, "
                    "read with `form: detection`."
                )
        if all(prediction.found is None for prediction in predictions):
            raise DataError("no boxes were read from the answers: this prompt does not ask the model for boxes.")
        if not any(prediction.expected and prediction.expected.boxes for prediction in predictions):
            raise DataError("the data set expects no box in any picture: precision and recall are undefined.")
        return score(predictions)

    return checked


def _require_any(predictions: Sequence[Prediction]) -> None:
    if not predictions:
        raise DataError("there are no predictions to score: the evaluation data is empty.")
