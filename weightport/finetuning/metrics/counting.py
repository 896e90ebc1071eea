"""Answers that count: {"dime": 3, "penny": 1}."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.scores import Scores, on_text
from weightport.finetuning.metrics.structured import documents

OTHER = "(other)"
"""Classes that answers name and no reference does."""

MOST = 1_000_000
"""Larger counts are taken as this one: a model that runs on writing digits must not make the mean infinite."""


@on_text
def count_error(predictions: Sequence[Prediction]) -> Scores:
    """By how much counts are wrong: the mean over samples of the absolute errors of all classes, lower is better.

    A class left out counts 0, as does one whose value is no number; an answer that is no JSON object counts nothing.
    Of several references the nearest one is taken. Details: each class's part of the value, "(other)" for the classes
    that no reference names. Raises DataError for a reference that is no object of numbers.
    """
    known: set[str] = set()
    per_class: Counter[str] = Counter()
    per_sample = []
    for prediction, answer, references in documents(predictions):
        for reference in references:
            if not isinstance(reference.value, dict) or not all(map(_is_number, reference.value.values())):
                raise DataError(
                    f'{prediction.place}: count-error needs answers like {{"dime": 3}}, not {reference.canonical:.80}.'
                )
            known.update(reference.value)
        mine = _counts(answer.value if answer is not None else None)
        errors = min(
            (_errors(mine, _counts(reference.value)) for reference in references), key=lambda e: sum(e.values())
        )
        per_sample.append(float(sum(errors.values())))
        per_class.update(errors)
    details = {f"count-error/{name}": float(per_class[name]) / len(per_sample) for name in sorted(known)}
    if other := sum(error for name, error in per_class.items() if name not in known):
        details[f"count-error/{OTHER}"] = float(other) / len(per_sample)
    return Scores(fmean(per_sample), details, per_sample)


def _counts(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    return {name: max(-MOST, min(number, MOST)) for name, number in value.items() if _is_number(number)}


def _errors(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {name: abs(mine.get(name, 0) - theirs.get(name, 0)) for name in sorted({*mine, *theirs})}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
