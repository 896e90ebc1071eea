"""Similarity of short answers: ANLS as DocVQA and as the Florence-2 guide compute it, Levenshtein, exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.scores import Scorer, Scores, library, on_text

THRESHOLD = 0.5
"""ANLS's tau: a similarity below it is a wrong answer, not a misread one (Biten et al. 2019, section 4.2)."""

Similarity = Callable[[str, str], float]


def best_over_references(similarity: Similarity) -> Scorer:
    """The metric that is the mean over samples of the highest `similarity(text, reference)`."""

    @on_text
    def score(predictions: Sequence[Prediction]) -> Scores:
        per_sample = [max(similarity(p.text, reference) for reference in p.references) for p in predictions]
        return Scores(fmean(per_sample), per_sample=per_sample)

    return score


def normalized_distance(one: str, other: str) -> float:
    """Insertions, deletions and substitutions of characters over the longer length: 0 equal … 1 nothing in common."""
    return float(library("rapidfuzz.distance").Levenshtein.normalized_distance(one, other))


def docvqa_similarity(text: str, reference: str) -> float:
    """As the challenge's evaluation script: case and runs of white space do not matter, 0.5 itself still counts.

    Like the script, distances are of the strings with white space collapsed, lengths of those as given.
    """
    length = max(len(text), len(reference))
    if length == 0:
        return 1.0
    distance = library("rapidfuzz.distance").Levenshtein.distance(_collapsed(text), _collapsed(reference))
    similarity = 1.0 - distance / length
    return similarity if similarity >= THRESHOLD else 0.0


def florence2_similarity(text: str, reference: str) -> float:
    """As the Florence-2 guide's metrics.py: lower case, one trailing "." removed, 0.5 itself is 0, empty text is 0."""
    if not text:
        return 0.0
    distance = normalized_distance(text.lower().removesuffix("."), reference.lower().removesuffix("."))
    return 1.0 - distance if distance < THRESHOLD else 0.0


def levenshtein_similarity(text: str, reference: str) -> float:
    """1 - normalised distance of the stripped strings, case kept, without a threshold."""
    return 1.0 - normalized_distance(text.strip(), reference.strip())


def exact_match(text: str, reference: str) -> float:
    """1.0 where the strings are equal after stripping outer white space, and nothing else."""
    return float(text.strip() == reference.strip())


anls = best_over_references(docvqa_similarity)
anls_florence2 = best_over_references(florence2_similarity)
levenshtein = best_over_references(levenshtein_similarity)
exact = best_over_references(exact_match)


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())
