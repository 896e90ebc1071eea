"""Samples to batches, in the data loader's workers: pictures are read and decoded here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from weightport.errors import DataError
from weightport.finetuning.augmentation import Augmentation
from weightport.finetuning.data.samples import Sample, Samples, left_to_skip
from weightport.finetuning.family import Family, prompt_of
from weightport.finetuning.features.store import FeatureStore
from weightport.finetuning.recipes.settings import BatchSettings

INDICES, FAILURE, STAND_IN = "sample_indices", "failure", "stand_in"
"""Beside the model's inputs, a batch says which samples it holds, or why it could not be made: an exception that
crosses a worker's process would arrive as a traceback. STAND_IN is there where all of its samples were bad, and
another one took their place."""

FEATURES, FEATURE_LENGTHS, FEATURE_ROWS = "features", "feature_lengths", "feature_rows"
"""In the place of pictures where these have been computed into features: see `FeatureStore.read`. FEATURE_ROWS: where
samples share features, which of them each has."""


class Indexed(torch.utils.data.Dataset[tuple[int, Sample | str]]):
    """`Samples` with their indices; a sample that cannot be read is the reason for it."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Sample | str]:
        try:
            return index, self.samples[index]
        except DataError as error:
            return index, str(error)


class BadSamples:
    """How many samples turned out bad while training, counted across the data loader's workers. `skip_bad`: how many
    of the data set may be, those that opening left out included."""

    def __init__(self, samples: Samples, skip_bad: int) -> None:
        self.skip_bad = skip_bad
        self.allowed = left_to_skip(samples, skip_bad)
        self._samples = Indexed(samples)
        self._seen = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    @property
    def count(self) -> int:
        """Samples left out so far, each once."""
        return int(self._seen.sum())

    def following(self, index: int) -> Iterator[tuple[int, Sample | str]]:
        """All other samples, from the one after `index` on."""
        for offset in range(1, len(self._samples)):
            yield self._samples[(index + offset) % len(self._samples)]

    def may_skip(self, index: int) -> bool:
        """Count the sample; False when it is one too many."""
        if not self.allowed:
            return False
        self._seen[index] = 1
        return self.count <= self.allowed


class FullAnswers:
    """How many samples have answers as long as answers may be, counted across the data loader's workers: what was
    longer has been cut."""

    def __init__(self, samples: Samples) -> None:
        self._seen = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    @property
    def count(self) -> int:
        """Samples seen so far, each once."""
        return int(self._seen.sum())

    def see(self, indices: Sequence[int], labels: torch.Tensor, longest: int) -> None:
        """Count those of the samples at `indices` that have `longest` labels [batch, length] but -100."""
        for index, labelled in zip(indices, (labels != -100).sum(dim=1).tolist()):
            if labelled >= longest:
                self._seen[index] = 1


@dataclass(frozen=True)
class StoredFeatures:
    """Features of a data set's samples; `record_of` int32 [samples] says where each sample's are. `grouped`: a batch
    holds each record once."""

    store: FeatureStore
    record_of: np.ndarray
    grouped: bool = False

    def require(self, index: int, sample: Sample) -> None:
        """Raises DataError when the sample's picture could not be read."""
        if not self.store.lengths[self.record_of[index]]:
            raise DataError(f"{sample.place}: its image could not be read when features were computed.")

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """What stands in a batch for the samples' pictures."""
        records = [int(self.record_of[index]) for index in indices]
        if not self.grouped:
            states, lengths = self.store.read(records)
            return {FEATURES: states, FEATURE_LENGTHS: lengths}
        distinct = list(dict.fromkeys(records))
        states, lengths = self.store.read(distinct)
        rows = torch.tensor([distinct.index(record) for record in records])
        return {FEATURES: states, FEATURE_LENGTHS: lengths, FEATURE_ROWS: rows}


@dataclass(frozen=True)
class _Row:
    """What becomes a row of a batch."""

    number: int
    place: str
    prompt: str
    answer: str
    image: Image.Image | None


@dataclass(frozen=True)
class Collator:
    """What the data loader calls: samples with their indices → the model's inputs, labels, and the indices. With
    `features` no picture is read. Where all samples of a batch are bad, the next good one takes their place: every
    process needs a batch. `full` counts answers as long as answers may be. `draft`: see `Picture.read`.
    `augmentation` changes pictures."""

    family: Family
    processor: Any
    config: Any
    batch: BatchSettings
    bad: BadSamples
    features: StoredFeatures | None = None
    full: FullAnswers | None = None
    augmentation: Augmentation | None = None
    draft: int | None = None

    def __call__(self, items: Sequence[tuple[int, Sample | str]]) -> dict[str, Any]:
        try:
            good, tensors = self._encoded(list(self._good(items)))
            stands_in = not good
            following = self._good(self.bad.following(items[-1][0])) if stands_in else iter(())
            while not good and (one := next(following, None)) is not None:
                good, tensors = self._encoded([one])
            if not good:
                raise DataError("Every sample is bad, so that there is nothing to train on.")
        except DataError as error:
            return {INDICES: torch.zeros(0, dtype=torch.long), FAILURE: str(error)}
        indices = [each.number for each in good]
        if self.full is not None and not self.batch.count_padding:
            self.full.see(indices, tensors["labels"], self.batch.max_target_length)
        if self.features is not None:
            tensors |= self.features.batch(indices)
        return {**tensors, INDICES: torch.tensor(indices)} | ({STAND_IN: True} if stands_in else {})

    def _encoded(self, good: list[_Row]) -> tuple[list[_Row], dict[str, torch.Tensor]]:
        """The samples that the model has positions for, and their tensors. Raises DataError for a longer one too
        many."""
        total = self.family.room(self.processor, self.config).total
        while good:
            pictures = None if self.features is not None else [each.image for each in good]
            prompts, answers = [each.prompt for each in good], [each.answer for each in good]
            tensors = self.family.encode(self.processor, self.config, self.batch, prompts, answers, pictures)
            if total is None:
                return good, tensors
            lengths = tensors["attention_mask"].sum(dim=1).tolist()
            fits = [length <= total for length in lengths]
            if all(fits):
                return good, tensors
            for each, length, is_short in zip(good, lengths, fits):
                if not is_short and not self.bad.may_skip(each.number):
                    message = (
                        f"{each.place}: prompt and answer are {length} tokens together, and the model has {total} "
                        "positions for them. Lower batch.max_prompt_length or batch.max_target_length."
                    )
                    raise DataError(_advice(message, self.bad))
            good = [each for each, is_short in zip(good, fits) if is_short]
        return [], {}

    def _good(self, items: Iterable[tuple[int, Sample | str]]) -> Iterator[_Row]:
        """Each sample that is good. Raises DataError for a bad one too many."""
        for index, sample in items:
            try:
                if isinstance(sample, str):
                    raise DataError(sample)
                image = self._picture(index, sample)
                if self.augmentation is not None and image is not None:
                    sample, image = self.augmentation(index, sample, image)
                prompt = prompt_of(self.family, self.processor, self.batch, sample)
                answer = self.family.answer(self.processor, self.batch, sample)
            except DataError as error:
                if self.bad.may_skip(index):
                    continue
                raise DataError(_advice(str(error), self.bad)) from error
            yield _Row(index, sample.place, prompt, answer, image)

    def _picture(self, index: int, sample: Sample) -> Image.Image | None:
        if self.features is not None:
            self.features.require(index, sample)
            return None
        return sample.picture.read(self.draft) if sample.picture else None


def _advice(message: str, bad: BadSamples) -> str:
    if bad.skip_bad:
        return f"{message}\n  More than {bad.skip_bad} samples are bad (--skip-bad {bad.skip_bad})."
    return f"{message}\n  Mend it, or pass --skip-bad N to leave out up to N bad samples."


@dataclass(frozen=True)
class Questions:
    """A batch to be answered: what was asked about which samples, and the model's inputs."""

    indices: tuple[int, ...]
    samples: tuple[Sample, ...]
    prompts: tuple[str, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    inputs: Mapping[str, torch.Tensor]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questioner:
    """Samples with their indices → `Questions`, or the message of the sample that is bad; `skip` leaves those out."""

    family: Family
    processor: Any
    batch: BatchSettings
    skip: bool

    def __call__(self, items: Sequence[tuple[int, Sample | str]]) -> Questions | str:
        good: list[tuple[int, Sample, str, Image.Image | None]] = []
        skipped = []
        for index, sample in items:
            try:
                if isinstance(sample, str):
                    raise DataError(sample)
                prompt = prompt_of(self.family, self.processor, self.batch, sample)
                good.append((index, sample, prompt, sample.picture.read() if sample.picture else None))
            except DataError as error:
                if not self.skip:
                    return f"{error}\n  Mend it, or pass --skip-bad N to leave out up to N bad samples."
                skipped.append(str(error))
        if not good:
            return Questions((), (), (), (), {}, tuple(skipped))
        indices, samples, prompts, images = zip(*good)
        return Questions(
            indices,
            samples,
            prompts,
            tuple(image.size if image is not None else None for image in images),
            self.family.questions(self.processor, self.batch, prompts, images),
            tuple(skipped),
        )
