"""Orders in which training samples are drawn, each decided by the seed and the epoch alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from weightport.errors import DataError, RecipeError
from weightport.finetuning.augmentation import Epoch
from weightport.finetuning.data.samples import Sample, Samples

WINDOW = 1024
"""Samples that are shuffled among each other where the order of files is kept otherwise."""


class BalancedSampler(Sampler[int]):
    """As many draws an epoch as there are samples, with replacement, in proportion to `weights` float64 [samples]."""

    def __init__(self, weights: np.ndarray, seed: int, epoch: Epoch) -> None:
        self._ends = np.cumsum(weights)
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[int]:
        draws = np.random.default_rng([self._seed, int(self._epoch)]).random(len(self._ends)) * self._ends[-1]
        # A draw that rounds up to the whole belongs to the last sample that has a weight.
        last = int(np.searchsorted(self._ends, self._ends[-1]))
        yield from np.minimum(np.searchsorted(self._ends, draws, side="right"), last).tolist()


class GroupedSampler(Sampler[int]):
    """Every sample once an epoch, those of one picture behind each other: pictures in random order, and the samples of
    each in random order. `pictures` int [samples]: equal where the picture is."""

    def __init__(self, pictures: np.ndarray, seed: int, epoch: Epoch) -> None:
        self._pictures = np.unique(pictures, return_inverse=True)[1]
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, int(self._epoch)])
        places = generator.permutation(self._pictures.max() + 1)[self._pictures]
        yield from np.lexsort((generator.random(len(places)), places)).tolist()


class NearbySampler(Sampler[int]):
    """Every sample once an epoch, WINDOW that stand next to each other at a time: windows in random order, cut anew in
    each epoch, and the samples of each in random order. So shards are read piece by piece, from one place each, and
    nothing is kept but the order of a window and of windows."""

    def __init__(self, samples: int, seed: int, epoch: Epoch) -> None:
        self._samples = samples
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, int(self._epoch)])
        first = int(generator.integers(WINDOW)) - WINDOW
        for window in generator.permutation(-(-(self._samples - first) // WINDOW)).tolist():
            begin = first + window * WINDOW
            inside = np.arange(max(begin, 0), min(begin + WINDOW, self._samples))
            yield from generator.permutation(inside).tolist()


def class_weights(samples: Samples) -> np.ndarray:
    """float64 [samples]: one over the number of samples of the sample's class; classes are then drawn equally often.

    A class is a label of the boxes, the rarest of a sample's counting, or the answer where there are no boxes. A
    sample that cannot be read is never drawn. Raises RecipeError where there is nothing to balance.
    """
    classes = [_classes(samples, index) for index in range(len(samples))]
    counts = Counter(name for names in classes for name in names)
    if len(counts) < 2:
        only = f"one class, {next(iter(counts))!r}" if counts else "no class"
        raise RecipeError(f"batch.sampling=balanced: {samples.name} has {only}. There is nothing to balance.")
    if max(counts.values()) == 1:
        raise RecipeError(
            f"batch.sampling=balanced: each of the {len(counts):,} answers in {samples.name} is there once. Classes "
            "are answers that several samples share."
        )
    return np.array([1 / min(counts[name] for name in names) if names else 0.0 for names in classes])


def pictures_of(samples: Samples) -> np.ndarray:
    """int64 [samples]: equal where samples have the same picture. Raises RecipeError where no two have."""
    numbers: dict[str, int] = {}
    found = []
    for index in range(len(samples)):
        try:
            picture = samples[index].picture
        except DataError:
            picture = None
        found.append(numbers.setdefault(picture.key if picture is not None else f"\0{index}", len(numbers)))
    if len(numbers) == len(samples):
        raise RecipeError(
            f"batch.group_by_image: every sample of {samples.name} has a picture of its own: nothing to group."
        )
    return np.array(found)


def _classes(samples: Samples, index: int) -> Sequence[str]:
    try:
        sample: Sample = samples[index]
    except DataError:
        # Whether it may be left out was decided when the data set was opened.
        return ()
    return sorted(set(sample.objects.labels)) if sample.objects is not None else (sample.suffix.strip(),)
