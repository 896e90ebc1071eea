"""Boxes: COCO's average precision, and F1 at an intersection over union of one half.

Labels meet by name, in lower case and stripped. Boxes without scores all have score 1 and keep the order of the
answer, so that an earlier box wins over a later one.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.samples import Objects
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.scores import Scores, library, on_boxes

OVERLAP = 0.5


@dataclass(frozen=True)
class Box:
    """One box of a picture: (x0, y0, x1, y1) in pixels."""

    label: str
    corners: tuple[float, float, float, float]
    score: float = 1.0


@on_boxes
def average_precision(predictions: Sequence[Prediction]) -> Scores:
    """AP@[.50:.05:.95] of pycocotools' COCOeval, 0 to 1: at most 100 boxes a picture, mean over the expected classes.

    As in COCO, boxes of a class that is expected nowhere do not lower the mean, for it has no precision; box-f1 counts
    them. Details: ap50, ap75 and the AP of every expected class, "ap/dog".
    """
    expected = [_expected(prediction) for prediction in predictions]
    found = [_boxes(prediction.found) for prediction in predictions]
    names = sorted({box.label for boxes in expected for box in boxes})
    unknown = sorted({box.label for boxes in found for box in boxes} - set(names))
    category = {name: number for number, name in enumerate([*names, *unknown], start=1)}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = library("pycocotools.cocoeval").COCOeval(
            _coco(expected, category), _coco(found, category), iouType="bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: [overlap threshold, recall, class, area, most boxes]; -1 where a class is expected nowhere.
    precision = evaluation.eval["precision"][..., 0, -1]
    per_class = {f"ap/{name}": float(precision[..., category[name] - 1].mean()) for name in names}
    ap, ap50, ap75 = map(float, evaluation.stats[:3])
    return Scores(ap, {"ap50": ap50, "ap75": ap75, **per_class})


@on_boxes
def box_f1(predictions: Sequence[Prediction]) -> Scores:
    """F1 of all boxes of all pictures together, 0 to 1.

    A found box is right when an expected one of its label, not taken by an earlier box, overlaps it by an intersection
    over union of at least 0.5; it takes the one that overlaps most. Details: precision and recall.
    """
    right = answered = wanted = 0
    per_sample = []
    for prediction in predictions:
        found, expected = _boxes(prediction.found), _expected(prediction)
        hits = _matches(found, expected)
        per_sample.append(_f1(hits, len(found), len(expected)))
        right, answered, wanted = right + hits, answered + len(found), wanted + len(expected)
    details = {"box-precision": right / answered if answered else 0.0, "box-recall": right / wanted}
    return Scores(_f1(right, answered, wanted), details, per_sample)


def _boxes(objects: Objects | None) -> list[Box]:
    """The boxes of a picture, highest score first."""
    if objects is None:
        return []
    scores = objects.scores if objects.scores is not None else (1.0,) * len(objects.boxes)
    boxes = [
        Box(label.strip().lower(), corners, score)
        for label, corners, score in zip(objects.labels, objects.boxes, scores)
    ]
    return sorted(boxes, key=lambda box: -box.score)


def _expected(prediction: Prediction) -> list[Box]:
    boxes = _boxes(prediction.expected)
    for box in boxes:
        if _area(box) <= 0:
            raise DataError(f"{prediction.place}: the expected box {box.corners} of {box.label!r} has no area.")
    return boxes


def _area(box: Box) -> float:
    x0, y0, x1, y1 = box.corners
    return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one.corners, other.corners
    common = max(min(ax1, bx1) - max(ax0, bx0), 0.0) * max(min(ay1, by1) - max(ay0, by0), 0.0)
    return common / (_area(one) + _area(other) - common)


def _matches(found: Iterable[Box], expected: Iterable[Box]) -> int:
    free = list(expected)
    hits = 0
    for box in found:
        near = [other for other in free if other.label == box.label and _overlap(box, other) >= OVERLAP]
        if near:
            free.remove(max(near, key=lambda other: _overlap(box, other)))
            hits += 1
    return hits


def _f1(hits: int, answered: int, expected: int) -> float:
    return 2 * hits / (answered + expected) if answered + expected else 1.0


def _coco(pictures: Sequence[Sequence[Box]], category: dict[str, int]) -> Any:
    """The boxes as a COCO data set of pycocotools. Ids begin at 1: COCOeval takes 0 for "not matched"."""
    coco = library("pycocotools.coco").COCO()
    coco.dataset = {
        "images": [{"id": number} for number, _ in enumerate(pictures, start=1)],
        "categories": [{"id": number, "name": name} for name, number in category.items()],
        "annotations": list(_annotations(pictures, category)),
    }
    coco.createIndex()
    return coco


def _annotations(pictures: Sequence[Sequence[Box]], category: dict[str, int]) -> Iterator[dict[str, Any]]:
    boxes = ((picture, box) for picture, several in enumerate(pictures, start=1) for box in several)
    for number, (picture, box) in enumerate(boxes, start=1):
        x0, y0, x1, y1 = box.corners
        yield {
            "id": number,
            "image_id": picture,
            "category_id": category[box.label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": _area(box),
            "score": box.score,
            "iscrowd": 0,
        }
