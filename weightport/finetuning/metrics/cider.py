"""CIDEr-D: how much an answer agrees with what people say about a picture, weighted by how telling the words are.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015), in the variant D that COCO's
caption evaluation uses: n-grams of one to four words, clipped counts, a Gaussian penalty on the difference in length
with sigma 6, times 10. Document frequencies come from the references of the pictures that are evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.scores import Scorer, Scores, on_text
from weightport.finetuning.metrics.segmentation import Segmenter, words, words_and_characters

LONGEST = 4
SIGMA = 6.0
SCALE = 10.0


@dataclass(frozen=True)
class Counts:
    """How often which n-gram of one length stands in which sentence: parallel arrays, by sentence, then n-gram."""

    sentence: np.ndarray
    ngram: np.ndarray
    count: np.ndarray


def cider_d(
    answers: Sequence[list[str]], references: Sequence[Sequence[list[str]]], pictures: Sequence[str]
) -> np.ndarray:
    """CIDEr-D of every answer: float64 [number of answers], 0 to 10.

    answers: the words of each. references: the words of each reference of each answer; at least one. pictures: which
    picture an answer describes; answers about the same picture are one document for the document frequencies.
    Raises DataError where the score is undefined: fewer than two pictures, or references that are all alike.
    """
    owner = np.repeat(np.arange(len(answers)), [len(several) for several in references])
    sentences = [*answers, *(reference for several in references for reference in several)]
    document = np.unique(np.asarray(pictures), return_inverse=True)[1]
    documents = int(document.max()) + 1
    if documents < 2:
        raise DataError(
            "CIDEr-D is undefined for a single picture: it weighs words by the share of pictures that they do not "
            "describe. Evaluate at least two pictures, or use bleu-4 or rouge-l."
        )
    length = np.array([len(sentence) for sentence in sentences], dtype=np.float64)
    penalty = np.exp(-((length[: len(answers)][owner] - length[len(answers) :]) ** 2) / (2 * SIGMA**2))

    total = np.zeros(len(owner))
    telling = False
    for counts in _ngram_counts(sentences):
        weight, weighs = _tf_idf(counts, document[owner], len(answers), documents)
        total += _cosines(counts, weight, owner, len(answers)) * penalty
        telling |= weighs
    if not telling:
        raise DataError(
            "CIDEr-D is undefined here: every n-gram of the references describes every picture. Use bleu-4 or rouge-l."
        )
    return SCALE / LONGEST * np.bincount(owner, total, len(answers)) / np.bincount(owner, minlength=len(answers))


def _ngram_counts(sentences: Sequence[list[str]]) -> list[Counts]:
    """Counts of the n-grams of length 1 … 4. Equal n-grams have equal numbers, 0 … V - 1 for each length."""
    vocabulary: dict[str, int] = {}
    word = np.array([vocabulary.setdefault(w, len(vocabulary)) for s in sentences for w in s], dtype=np.int64)
    sentence = np.repeat(np.arange(len(sentences)), [len(s) for s in sentences])
    ngram, found = word, []
    for n in range(1, LONGEST + 1):
        start = np.arange(len(ngram))
        if n > 1:
            # An n-gram is the (n-1)-gram at its start and the word that follows it in the same sentence.
            start = start[: max(len(word) - n + 1, 0)]
            start = start[sentence[start] == sentence[start + n - 1]]
            pairs = ngram[start] * max(len(vocabulary), 1) + word[start + n - 1]
            numbers = np.unique(pairs, return_inverse=True)[1]
            ngram = np.zeros(len(word), dtype=np.int64)
            ngram[start] = numbers
        kinds = int(ngram[start].max()) + 1 if len(start) else 1
        keys, count = np.unique(sentence[start] * kinds + ngram[start], return_counts=True)
        found.append(Counts(keys // kinds, keys % kinds, count))
    return found


def _tf_idf(counts: Counts, document: np.ndarray, answers: int, documents: int) -> tuple[np.ndarray, bool]:
    """Weight of every count, and whether any n-gram of the references weighs more than nothing.

    The count times the logarithm of how many times more pictures there are than pictures whose references hold the
    n-gram; an n-gram that no reference holds counts as if one did.
    """
    kinds = int(counts.ngram.max()) + 1 if len(counts.ngram) else 1
    ours = counts.sentence >= answers
    held = np.unique(document[counts.sentence[ours] - answers] * kinds + counts.ngram[ours])
    frequency = np.bincount(held % kinds, minlength=kinds)
    idf = np.log(documents) - np.log(np.maximum(frequency, 1))
    return counts.count * idf[counts.ngram], bool((idf[frequency > 0] > 0).any())


def _cosines(counts: Counts, weight: np.ndarray, owner: np.ndarray, answers: int) -> np.ndarray:
    """Clipped cosine of every reference with its answer: float64 [number of references]."""
    kinds = int(counts.ngram.max()) + 1 if len(counts.ngram) else 1
    norm = np.sqrt(np.bincount(counts.sentence, weight**2, answers + len(owner)))
    split = int(np.searchsorted(counts.sentence, answers))
    answer_keys = counts.sentence[:split] * kinds + counts.ngram[:split]
    reference = counts.sentence[split:] - answers
    wanted = owner[reference] * kinds + counts.ngram[split:]
    place = np.searchsorted(answer_keys, wanted)
    met = np.zeros(len(wanted), dtype=bool)
    inside = place < len(answer_keys)
    met[inside] = answer_keys[place[inside]] == wanted[inside]

    theirs, mine = weight[split:][met], weight[:split][place[met]]
    dot = np.bincount(reference[met], np.minimum(mine, theirs) * theirs, len(owner))
    norms = norm[:answers][owner] * norm[answers:]
    return np.divide(dot, norms, out=np.zeros(len(owner)), where=norms > 0)


def consensus(segmenter: Segmenter) -> Scorer:
    """CIDEr-D as a metric, its words cut by `segmenter`."""

    @on_text
    def score(predictions: Sequence[Prediction]) -> Scores:
        per_sample = cider_d(
            [segmenter(p.text) for p in predictions],
            [[segmenter(reference) for reference in p.references] for p in predictions],
            [p.key or p.place for p in predictions],
        )
        return Scores(float(per_sample.mean()), per_sample=per_sample.tolist())

    return score


cider_by_character = consensus(words_and_characters)
cider_by_word = consensus(words)
