"""Random changes of training pictures, drawn from the seed, the epoch and the sample alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from weightport.errors import DataError, RecipeError
from weightport.finetuning.data.samples import Objects, Sample, Samples

Draw = Callable[[Image.Image, np.random.Generator], Image.Image]

_PLACES_IN_WORDS = re.compile(r"<(?:loc|bin)_?\d+>")
"""Location tokens of Florence-2, PaliGemma and OFA in an answer that the data wrote themselves."""

_MEAN_COLOUR = (124, 116, 104)
"""ImageNet's mean in 0 to 255: what is behind the corners of a rotated picture."""


@dataclass(frozen=True)
class Change:
    """One kind of change. `moves`: things stand elsewhere in the picture afterwards."""

    about: str
    draw: Draw
    moves: bool = False


def _color(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(generator.uniform(0.8, 1.2))
    return picture


def _blur(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(generator.uniform(0.0, min(picture.size) / 400)))


def _noise(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.float32)
    noise = generator.normal(0.0, generator.uniform(0.0, 8.0), pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))


def _jpeg(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    file = BytesIO()
    picture.save(file, "JPEG", quality=int(generator.integers(40, 96)))
    return Image.open(file).convert("RGB")


def _rotate(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    return picture.rotate(generator.uniform(-3.0, 3.0), Image.Resampling.BILINEAR, fillcolor=_MEAN_COLOUR)


def _flip(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _mirrors(generator) else picture


def _mirrors(generator: np.random.Generator) -> bool:
    return bool(generator.random() < 0.5)


CHANGES: Mapping[str, Change] = {
    "color": Change("brightness, contrast and saturation by up to a fifth", _color),
    "blur": Change("Gaussian blur of up to 1/400 of the shorter side", _blur),
    "noise": Change("Gaussian noise of up to 8 of 255 levels", _noise),
    "jpeg": Change("JPEG compression at quality 40 to 95", _jpeg),
    "rotate": Change("rotation by up to 3 degrees; not for boxes", _rotate, moves=True),
    "flip": Change("every second picture mirrored, and its boxes with it", _flip, moves=True),
}
"""By name, in the order in which they are made."""


class Epoch:
    """The number of the current epoch, seen by the data loader's workers."""

    def __init__(self) -> None:
        self._number = torch.zeros(1, dtype=torch.int64).share_memory_()

    def begin(self, number: int) -> None:
        """Every sample that is read from now on belongs to this epoch."""
        self._number[0] = number

    def __int__(self) -> int:
        return int(self._number[0])


@dataclass(frozen=True)
class Augmentation:
    """Changes by name. Each draws its own random numbers from (seed, epoch, sample, change): a resumed run, another
    number of processes and one more change all leave the others' as they are."""

    names: tuple[str, ...]
    seed: int
    epoch: Epoch

    def __call__(self, index: int, sample: Sample, picture: Image.Image) -> tuple[Sample, Image.Image]:
        """The sample at `index` and its picture, changed; boxes are moved with what they are around."""
        for number, (name, change) in enumerate(CHANGES.items()):
            if name not in self.names:
                continue
            key = [self.seed, int(self.epoch), index, number]
            picture = change.draw(picture, np.random.default_rng(key))
            if name == "flip" and sample.objects is not None and _mirrors(np.random.default_rng(key)):
                sample = replace(sample, objects=mirrored(sample.objects))
        return sample, picture


def mirrored(objects: Objects) -> Objects:
    """The objects in the mirrored picture."""
    width = objects.size[0]
    return replace(objects, boxes=tuple((width - x1, y0, width - x0, y1) for x0, y0, x1, y1 in objects.boxes))


def require_changes(names: Sequence[str], samples: Samples) -> None:
    """Raises RecipeError for a change that there is not, or that would make the data's answers wrong."""
    for name in names:
        if name not in CHANGES:
            known = "".join(f"\n    {each:<8}{change.about}" for each, change in CHANGES.items())
            raise RecipeError(f"batch.augment: there is no change {name!r} of pictures. There are{known}")
    moving = [name for name in names if CHANGES[name].moves]
    for index in range(len(samples) if moving else 0):
        try:
            sample = samples[index]
        except DataError:
            # Whether it may be left out is decided where it is trained on.
            continue
        if sample.objects is not None and "rotate" in moving:
            raise RecipeError(f"batch.augment=rotate: {sample.place} has boxes, which would no longer fit.")
        if _PLACES_IN_WORDS.search(sample.suffix + sample.prefix):
            raise RecipeError(
                f"batch.augment={moving[0]}: {sample.place} says places in its text, which would stay where they are."
            )
