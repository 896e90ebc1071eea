"""Answers that are JSON: valid or not, equal or not, which fields are right, how far the text is from the expected."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.edit_distance import normalized_distance
from weightport.finetuning.metrics.scores import Scores, on_text

Field = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class Document:
    """A JSON value in the forms that are compared.

    canonical: the one way to write it: keys sorted, no white space, 5.0 and 5e0 as 5. fields: its leaves as (path of
    keys, canonical leaf) with their multiplicity; every position of a list is the path "[]", so that the order of a
    list does not matter (as in Donut's evaluation); an empty object or list is a leaf. Types matter: 5 is not "5".
    """

    value: Any
    canonical: str
    fields: Counter[Field]


def read_json(text: str) -> Document | None:
    """The JSON document that `text` is (RFC 8259: NaN is none), or None. Of equal keys the last one counts."""
    try:
        value = json.loads(text, parse_float=_number, parse_constant=_refuse)
        return Document(value, _canonical(value), Counter(_leaves(value, ())))
    except (ValueError, RecursionError):
        return None


def documents(predictions: Sequence[Prediction]) -> Iterator[tuple[Prediction, Document | None, list[Document]]]:
    """Every prediction with its answer and its references read. Raises DataError for a reference that is no JSON."""
    for prediction in predictions:
        references = [read_json(reference) for reference in prediction.references]
        for text, reference in zip(prediction.references, references):
            if reference is None:
                raise DataError(f"{prediction.place}: metrics of JSON answers need JSON references, not {text!r:.80}.")
        yield prediction, read_json(prediction.text), [reference for reference in references if reference is not None]


@on_text
def json_valid(predictions: Sequence[Prediction]) -> Scores:
    """Share of answers that are a JSON document."""
    per_sample = [float(read_json(prediction.text) is not None) for prediction in predictions]
    return Scores(fmean(per_sample), per_sample=per_sample)


@on_text
def exact_match_json(predictions: Sequence[Prediction]) -> Scores:
    """Share of answers with the value of a reference: layout and order of keys do not matter, that of lists does."""
    per_sample = [
        float(answer is not None and answer.canonical in {reference.canonical for reference in references})
        for _, answer, references in documents(predictions)
    ]
    return Scores(fmean(per_sample), per_sample=per_sample)


@on_text
def json_f1(predictions: Sequence[Prediction]) -> Scores:
    """F1 of all fields of all samples together (micro); an answer that is no JSON has no fields.

    Of several references the one with the highest F1 of the sample counts. Details: precision and recall.
    """
    right = answered = expected = 0
    per_sample = []
    for _, answer, references in documents(predictions):
        mine: Counter[Field] = answer.fields if answer is not None else Counter()
        rated = [((mine & reference.fields).total(), reference.fields.total()) for reference in references]
        hits, size = max(rated, key=lambda pair: _f1(pair[0], mine.total(), pair[1]))
        per_sample.append(_f1(hits, mine.total(), size))
        right, answered, expected = right + hits, answered + mine.total(), expected + size
    details = {"json-precision": right / answered if answered else 0.0, "json-recall": right / expected}
    return Scores(_f1(right, answered, expected), details, per_sample)


@on_text
def json_edit(predictions: Sequence[Prediction]) -> Scores:
    """Mean edit distance from the nearest reference over the longer length: 0 equal … 1, lower is better.

    Between canonical texts where the answer is JSON, so that layout and the order of keys cost nothing; between the
    stripped texts as they stand where it is not, so that a missing bracket costs one character.
    """
    per_sample = []
    for prediction, answer, references in documents(predictions):
        if answer is not None:
            text, others = answer.canonical, [reference.canonical for reference in references]
        else:
            text, others = prediction.text.strip(), [reference.strip() for reference in prediction.references]
        per_sample.append(min(normalized_distance(text, other) for other in others))
    return Scores(fmean(per_sample), per_sample=per_sample)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[Field]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _leaves(inner, (*path, "[]"))
    else:
        yield path, _canonical(value)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON value")


def _f1(hits: int, answered: int, expected: int) -> float:
    return 2 * hits / (answered + expected)
