"""Samples to batches, in the data loader's workers: pictures are read and decoded here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from weightport.errors import DataError
from weightport.finetuning.data.samples import Sample, Samples, left_to_skip
from weightport.finetuning.family import Family
from weightport.finetuning.features.store import FeatureStore
from weightport.finetuning.recipes.settings import BatchSettings

INDICES, FAILURE = "sample_indices", "failure"
"""Beside the model's inputs, a batch says which samples it holds, or why it could not be made: an exception that
crosses a worker's process would arrive as a traceback."""

FEATURES, FEATURE_LENGTHS = "features", "feature_lengths"
"""In the place of pictures where these have been computed into features: see `FeatureStore.read`."""


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
        self._seen = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    @property
    def count(self) -> int:
        """Samples left out so far, each once."""
        return int(self._seen.sum())

    def may_skip(self, index: int) -> bool:
        """Count the sample; False when it is one too many."""
        if not self.allowed:
            return False
        self._seen[index] = 1
        return self.count <= self.allowed


@dataclass(frozen=True)
class StoredFeatures:
    """Features of a data set's samples; `record_of` int32 [samples] says where each sample's are."""

    store: FeatureStore
    record_of: np.ndarray

    def require(self, index: int, sample: Sample) -> None:
        """Raises DataError when the sample's picture could not be read."""
        if not self.store.lengths[self.record_of[index]]:
            raise DataError(f"{sample.place}: its image could not be read when features were computed.")

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """What stands in a batch for the samples' pictures."""
        states, lengths = self.store.read([int(self.record_of[index]) for index in indices])
        return {FEATURES: states, FEATURE_LENGTHS: lengths}


@dataclass(frozen=True)
class Collator:
    """What the data loader calls: samples with their indices → the model's inputs, labels, and the indices. With
    `features` no picture is read."""

    family: Family
    processor: Any
    config: Any
    batch: BatchSettings
    bad: BadSamples
    features: StoredFeatures | None = None

    def __call__(self, items: Sequence[tuple[int, Sample | str]]) -> dict[str, Any]:
        indices, prompts, answers, images = [], [], [], []
        try:
            for index, sample in items:
                try:
                    if isinstance(sample, str):
                        raise DataError(sample)
                    answer = self.family.answer(self.processor, self.batch, sample)
                    image = self._picture(index, sample)
                except DataError as error:
                    if self.bad.may_skip(index):
                        continue
                    raise DataError(_advice(str(error), self.bad)) from error
                indices.append(index)
                prompts.append(self.family.prompt(self.processor, self.batch, sample))
                answers.append(answer)
                images.append(image)
            if not indices:
                raise DataError("Every sample of a batch is bad, so that there is nothing to train on.")
            pictures = None if self.features is not None else images
            tensors = self.family.encode(self.processor, self.config, self.batch, prompts, answers, pictures)
        except DataError as error:
            return {INDICES: torch.zeros(0, dtype=torch.long), FAILURE: str(error)}
        if self.features is not None:
            tensors |= self.features.batch(indices)
        return {**tensors, INDICES: torch.tensor(indices)}

    def _picture(self, index: int, sample: Sample) -> Image.Image | None:
        if self.features is not None:
            self.features.require(index, sample)
            return None
        return sample.picture.read() if sample.picture else None


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
        good: list[tuple[int, Sample, Image.Image | None]] = []
        skipped = []
        for index, sample in items:
            try:
                if isinstance(sample, str):
                    raise DataError(sample)
                good.append((index, sample, sample.picture.read() if sample.picture else None))
            except DataError as error:
                if not self.skip:
                    return f"{error}\n  Mend it, or pass --skip-bad N to leave out up to N bad samples."
                skipped.append(str(error))
        if not good:
            return Questions((), (), (), (), {}, tuple(skipped))
        indices, samples, images = zip(*good)
        prompts = [self.family.prompt(self.processor, self.batch, sample) for sample in samples]
        return Questions(
            indices,
            samples,
            tuple(prompts),
            tuple(image.size if image is not None else None for image in images),
            self.family.questions(self.processor, self.batch, prompts, images),
            tuple(skipped),
        )
