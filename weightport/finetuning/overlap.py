"""Samples that are in the training data and in the evaluation data: what is measured on them was learned by heart."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from weightport.errors import DataError
from weightport.finetuning.data.hashing import key_of
from weightport.finetuning.data.samples import Objects, Picture, Samples
from weightport.finetuning.evaluation.answering import chosen
from weightport.formatting import samples as in_words

COMPARED, SEARCHED = 2_000, 50_000
"""Samples of the evaluation and of the training data that are looked at, spread evenly over each."""

MOST_READ = 2**30
"""Bytes of pictures that are read to compare them."""


def overlap_note(training: Samples, evaluation: Samples) -> str | None:
    """A note on samples that both data sets hold (the same question, answer and bytes of the picture), or None.

    Annotations are compared first, and pictures read only where these agree.
    """
    if training.content == evaluation.content:
        return "warning: the evaluation data are the training data, so that what is measured was trained on"
    looked_at = chosen(len(evaluation), COMPARED)
    by_text: dict[int, list[int]] = defaultdict(list)
    for index in looked_at:
        for key in _texts(evaluation, index):
            by_text[key].append(index)
    digests, by_picture = _Digests(), {}
    shared: dict[int, int] = {}
    for index in chosen(len(training), SEARCHED):
        for key in _texts(training, index) & by_text.keys():
            if key not in by_picture:
                by_picture[key] = {digests.of(evaluation, other): other for other in by_text[key]}
            picture = digests.of(training, index)
            if picture is not None and picture in by_picture[key]:
                shared.setdefault(by_picture[key][picture], index)
    if not shared:
        return None
    other, index = next(iter(shared.items()))
    of = f"{len(shared):,} of {in_words(len(looked_at))}"
    return (
        f"warning: {of} looked at in the evaluation data are in the training data too (the same picture, question and "
        f"answer), such as {evaluation[other].place} and {training[index].place}"
    )


def _texts(samples: Samples, index: int) -> set[int]:
    """A key for each answer of a sample, with its question; none where the sample cannot be read."""
    try:
        sample = samples[index]
    except DataError:
        return set()
    answers = [_described(sample.objects)] if sample.objects is not None else sample.references
    return {key_of(sample.prefix.encode(), answer.encode()) for answer in answers}


def _described(objects: Objects) -> str:
    return repr((objects.size, sorted(zip(objects.labels, objects.boxes))))


class _Digests:
    """Digests of samples' pictures, each read once, as long as there is room in MOST_READ."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], bytes | None] = {}
        self._read = 0

    def of(self, samples: Samples, index: int) -> bytes | None:
        """The digest of a sample's picture, empty for a sample without one; None where it was not read."""
        try:
            picture = samples[index].picture
        except DataError:
            return None
        if picture is None:
            return b""
        name = id(samples), picture.key
        if name not in self._known:
            self._known[name] = self._computed(picture) if self._read < MOST_READ else None
        return self._known[name]

    def _computed(self, picture: Picture) -> bytes | None:
        try:
            content = picture.stored()
        except DataError:
            return None
        self._read += len(content)
        return hashlib.blake2b(content).digest()
