"""Recall of image-text retrieval: how often what belongs together is among the first found."""

from __future__ import annotations

from collections.abc import Sequence

from weightport.errors import UsageError
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.scores import Scores

NAME = "recall"
CUTS = (1, 5, 10)


def recall_of_answers(predictions: Sequence[Prediction]) -> Scores:
    """Answers have no ranks: raises UsageError."""
    raise UsageError(
        f"{NAME} is measured on a model for image-text retrieval (a stage-1 BLIP-2), with `weightport evaluate`; this "
        "model answers in words."
    )


def recall(text_ranks: Sequence[int], image_ranks: Sequence[int], ending: str = "") -> Scores:
    """Recall at 1, 5 and 10, in percent, both ways, and the mean of the six.

    `text_ranks`: of each picture, how many texts were found before the first of its own (0: none). `image_ranks`: of
    each text, how many pictures before its own. `ending` follows the names.
    """
    details = {
        f"{NAME}-{what}-{cut}{ending}": 100.0 * sum(rank < cut for rank in ranks) / len(ranks)
        for what, ranks in (("text", text_ranks), ("image", image_ranks))
        for cut in CUTS
    }
    return Scores(sum(details.values()) / len(details), details)
