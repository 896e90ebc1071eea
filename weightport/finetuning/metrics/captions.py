"""BLEU-4 and ROUGE-L of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from statistics import fmean
from typing import Any

from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.scores import Scores, library, on_text
from weightport.finetuning.metrics.segmentation import has_chinese, words_and_characters

BETA = 1.2
"""How much more recall weighs than precision in COCO's ROUGE-L."""


@on_text
def bleu_4(predictions: Sequence[Prediction]) -> Scores:
    """Corpus BLEU of sacrebleu's default settings (case kept, 13a, exponential smoothing), 0 to 100.

    One Chinese reference switches the tokenisation of the whole corpus to sacrebleu's `zh`: Han by character, the rest
    by 13a. Samples may have different numbers of references. Details: BLEU of shorter n-grams, the brevity penalty.
    """
    bleu = library("sacrebleu.metrics").BLEU
    references = [[r for r in p.references if r.strip()] for p in predictions]
    chinese = any(has_chinese(reference) for several in references for reference in several)
    measure = bleu(tokenize="zh" if chinese else "13a", force=True)  # force: no warning about tokenised input
    result = measure.corpus_score([p.text for p in predictions], [list(column) for column in zip_longest(*references)])
    shorter = {
        f"bleu-{n}": bleu.compute_bleu(
            result.counts, result.totals, result.sys_len, result.ref_len, smooth_method="exp", max_ngram_order=n
        ).score
        for n in (1, 2, 3)
    }
    return Scores(result.score, {**shorter, "bleu-brevity-penalty": result.bp})


@on_text
def rouge_l(predictions: Sequence[Prediction]) -> Scores:
    """Longest common subsequence as COCO's caption evaluation scores it, 0 to 1.

    F with beta 1.2 of the best precision and the best recall over the references. Detail: rouge-score's own figure,
    the F1 of the best reference. Words as in `segmentation`, Chinese by character.
    """
    per_sample, f1 = [], []
    for prediction in predictions:
        text = words_and_characters(prediction.text)
        found = [_overlap(words_and_characters(reference), text) for reference in prediction.references]
        per_sample.append(_f_beta(max(p for p, _, _ in found), max(r for _, r, _ in found)))
        f1.append(max(f for _, _, f in found))
    return Scores(fmean(per_sample), {"rouge-l-f1": fmean(f1)}, per_sample)


def _overlap(reference: list[str], text: list[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one reference. Sentences without a word are equal to each other, not to others."""
    if not reference and not text:
        return 1.0, 1.0, 1.0
    score = _rouge().score(reference, text)["rougeL"]
    return score.precision, score.recall, score.fmeasure


def _f_beta(precision: float, recall: float) -> float:
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


class _AlreadyCut:
    """The tokenizer that rouge-score asks for, of sentences that are words already: its own keeps only a-z and 0-9."""

    def tokenize(self, words: list[str]) -> list[str]:
        return words


@cache
def _rouge() -> Any:
    return library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_AlreadyCut())
