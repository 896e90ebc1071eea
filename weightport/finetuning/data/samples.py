"""What a data set gives: one sample at a time, its picture not yet decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

from PIL import Image

from weightport.errors import DataError
from weightport.pictures import BROKEN_PICTURE, picture_formats


@dataclass(frozen=True)
class Picture:
    """An image of a data set. `key` names it within the data set and stays the same in every run."""

    key: str
    place: str
    load: Callable[[], bytes | Image.Image]

    def read(self, draft: int | None = None) -> Image.Image:
        """The decoded picture in RGB. `draft`: a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size
        whose sides have that many pixels. Raises DataError, naming `place`, when it is missing or no picture."""
        try:
            found = self._loaded()
            picture = Image.open(BytesIO(found), formats=picture_formats()) if isinstance(found, bytes) else found
            if draft is not None:
                picture.draft("RGB", (draft, draft))
            return picture.convert("RGB")
        except BROKEN_PICTURE as error:
            raise self._broken(error) from error

    def stored(self) -> bytes:
        """The bytes of the picture as they are stored, not decoded. Raises DataError as `read` where none are."""
        found = self._loaded()
        return found if isinstance(found, bytes) else found.tobytes()

    def _loaded(self) -> bytes | Image.Image:
        try:
            return self.load()
        except FileNotFoundError as error:
            raise DataError(f"{self.place}: the image {self.key} does not exist.") from error
        except BROKEN_PICTURE as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> DataError:
        return DataError(f"{self.place}: the image {self.key} cannot be read as a picture: {error}.")


@dataclass(frozen=True)
class Objects:
    """What is in a picture: labels and boxes (x0, y0, x1, y1) in pixels of a picture of `size` (width, height)."""

    labels: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    size: tuple[int, int]
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """One thing to learn or to answer.

    `prefix` is what is asked about the picture, empty where the recipe's prompt says all; `suffix` is the answer to
    train on, empty where `objects` are the answer and the family writes them in its own symbols. `references` are all
    answers that metrics accept. `place` says where it stands: "train.jsonl, line 7". `classes` are all that are looked
    for, in this picture or not, where the data say.
    """

    place: str
    picture: Picture | None
    prefix: str
    suffix: str
    references: tuple[str, ...]
    objects: Objects | None = None
    classes: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


class Samples(Protocol):
    """A data set: a map from 0 … len - 1 to samples, read on demand. Pickles, so that data loader workers can read.

    `samples[i]` raises DataError naming file and line. `skipped` are the places that `skip_bad` left out when the data
    set was opened, each with the reason. `fingerprint`: 64 hexadecimal digits that change with files and settings;
    `content`: 64 that change with questions, answers and names of pictures, wherever the files are.
    """

    @property
    def name(self) -> str: ...

    @property
    def skipped(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def content(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def left_to_skip(samples: Samples, skip_bad: int) -> int:
    """How many samples may still be left out of the `skip_bad`, after those that opening left out."""
    return max(0, skip_bad - len(samples.skipped))
