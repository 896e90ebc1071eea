"""Predictions as metrics read them, made from what a test says."""

from __future__ import annotations

from collections.abc import Sequence

from weightport.finetuning.data.samples import Objects
from weightport.finetuning.evaluation.predictions import Prediction

Boxes = Sequence[tuple[str, tuple[float, float, float, float]]]


def answered(*pairs: tuple[str, str | Sequence[str]]) -> list[Prediction]:
    """One prediction for every (text, reference or references), each about a picture of its own."""
    return [
        Prediction(
            index=index,
            place=f"val.jsonl, line {index + 1}",
            key=f"{index}.jpg",
            prompt="",
            text=text,
            references=(references,) if isinstance(references, str) else tuple(references),
        )
        for index, (text, references) in enumerate(pairs)
    ]


def boxed(*pairs: tuple[Boxes, Boxes], scores: Sequence[Sequence[float]] | None = None) -> list[Prediction]:
    """One prediction for every (found, expected): boxes (label, (x0, y0, x1, y1)) in a picture of 200 x 200."""
    return [
        Prediction(
            index=index,
            place=f"picture {index + 1}",
            key=f"{index}.jpg",
            prompt="",
            text="",
            references=(),
            found=_objects(found, tuple(scores[index]) if scores else None),
            expected=_objects(expected, None),
        )
        for index, (found, expected) in enumerate(pairs)
    ]


def _objects(boxes: Boxes, scores: tuple[float, ...] | None) -> Objects:
    return Objects(tuple(label for label, _ in boxes), tuple(box for _, box in boxes), (200, 200), scores)
