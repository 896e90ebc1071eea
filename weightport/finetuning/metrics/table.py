"""Every metric by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightport.errors import DataError, UsageError
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics import captions, cider, counting, detection, edit_distance, ranking, structured
from weightport.finetuning.metrics.scores import Metric

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("anls", "edit similarity as DocVQA's challenge scores it", True, 1.0, "text", edit_distance.anls),
        Metric(
            "anls-florence2",
            "ANLS as the Florence-2 guide computes it",
            True,
            1.0,
            "text",
            edit_distance.anls_florence2,
        ),
        Metric("levenshtein", "edit similarity without a threshold", True, 1.0, "text", edit_distance.levenshtein),
        Metric("exact-match", "share of answers equal to a reference", True, 1.0, "text", edit_distance.exact),
        Metric("exact-match-json", "share of equal JSON values", True, 1.0, "text", structured.exact_match_json),
        Metric("json-valid", "share of answers that are JSON", True, 1.0, "text", structured.json_valid),
        Metric("json-f1", "F1 of the fields of JSON answers", True, 1.0, "text", structured.json_f1),
        Metric("json-edit", "edit distance of JSON answers", False, 0.0, "text", structured.json_edit),
        Metric("count-error", "total absolute error of counts in JSON", False, 0.0, "text", counting.count_error),
        Metric("bleu-4", "corpus BLEU of sacrebleu, 0 to 100", True, 100.0, "text", captions.bleu_4),
        Metric("rouge-l", "longest common subsequence, as COCO captions", True, 1.0, "text", captions.rouge_l),
        Metric(
            "cider-d", "CIDEr-D, Chinese by character, 0 to 10", True, 10.0, "text", cider.cider_by_character, fewest=2
        ),
        Metric(
            "cider-d-words",
            "CIDEr-D, Chinese by word (jieba), 0 to 10",
            True,
            10.0,
            "text",
            cider.cider_by_word,
            fewest=2,
        ),
        Metric("ap", "COCO average precision of boxes", True, 1.0, "boxes", detection.average_precision),
        Metric(ranking.NAME, "image-text retrieval, 0 to 100", True, 100.0, "ranks", ranking.recall_of_answers),
        Metric("box-f1", "F1 of boxes that overlap by half", True, 1.0, "boxes", detection.box_f1),
    )
}


DETAILS = frozenset(
    ("bleu-1", "bleu-2", "bleu-3", "bleu-brevity-penalty", "rouge-l-f1", "json-precision", "json-recall", "ap50",
     "ap75", "box-precision", "box-recall")
)  # fmt: skip
"""Figures that come with a metric, beside those of single classes (`ap/cat`): kept in metrics.json, and not shown."""


def headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures but for the details of metrics."""
    return {name: figure for name, figure in figures.items() if not _is_detail(name)}


def _is_detail(name: str) -> bool:
    metric, slash, _ = name.partition("/")
    return name in DETAILS or (bool(slash) and metric in METRICS)


def metric_named(name: str) -> Metric:
    """The metric of that name. Raises UsageError listing all of them."""
    if name not in METRICS:
        raise UsageError(f"there is no metric {name!r}. Known metrics: {', '.join(METRICS)}.")
    return METRICS[name]


def score_all(names: Iterable[str], predictions: Sequence[Prediction]) -> dict[str, float]:
    """The figures of several metrics by name, each followed by its details: what metrics.json holds.

    Raises UsageError for an unknown name before anything is computed, DataError where a metric is undefined.
    """
    metrics = [metric_named(name) for name in dict.fromkeys(names)]
    figures: dict[str, float] = {}
    for metric in metrics:
        if 0 < len(predictions) < metric.fewest:
            raise DataError(
                f"{metric.name} is undefined for {len(predictions)} sample: it needs at least {metric.fewest}. "
                "Evaluate more, or choose another metric."
            )
        scores = metric.score(predictions)
        figures[metric.name] = scores.value
        figures.update(scores.details)
    return figures
