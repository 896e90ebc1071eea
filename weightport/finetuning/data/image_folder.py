"""Images in files: found by the names that annotations give them, and only inside their folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.columns import check_letters, kind_of
from weightport.finetuning.data.samples import Picture

MOST_CHECKED = 10_000
"""Inner folders that are remembered as being no way out."""


@dataclass(frozen=True)
class ImageFile:
    """Reads a file that was found in its folder."""

    path: str

    def __call__(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


class ImageFolder:
    """A folder that image names are relative to.

    A name from inside a data set may not lead out of the folder, neither by being absolute, nor by "..", nor through a
    symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real = os.path.realpath(path)
        self._checked: set[str] = set()

    def find(self, name: Any, place: str) -> tuple[str, int, int]:
        """Path of the image file `name`, its bytes, and the time of its last change in nanoseconds.

        Raises DataError when the name leads outside or nowhere, or to an empty file.
        """
        path = os.path.join(self.path, _safe_name(name, place))
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                self._check_inside(path, name, place)
                found = os.stat(path)
            elif (parent := os.path.dirname(path)) not in self._checked:
                self._check_inside(path, name, place)
                if len(self._checked) < MOST_CHECKED:
                    self._checked.add(parent)
        except OSError as error:
            raise DataError(f"{place}: the image {name!r} is not in {self.path}: {error.strerror}.") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{place}: the image {name!r} in {self.path} is no file.")
        if not found.st_size:
            raise DataError(f"{place}: the image {name!r} in {self.path} is an empty file.")
        return path, found.st_size, found.st_mtime_ns

    def picture(self, name: Any, place: str) -> Picture:
        return Picture(PurePosixPath(name).as_posix(), place, ImageFile(self.find(name, place)[0]))

    def _check_inside(self, path: str, name: str, place: str) -> None:
        real = os.path.realpath(path)
        if os.path.commonpath((real, self._real)) != self._real:
            raise DataError(
                f"{place}: the image {name!r} leads out of {self.path} through a symbolic link, to {real}. "
                "Name the folder that holds the images with data.images."
            )


def _safe_name(name: Any, place: str) -> str:
    if not isinstance(name, str):
        raise DataError(f"{place}: the name of an image was expected, found {kind_of(name)}.")
    if not name.strip() or "\0" in name:
        raise DataError(f"{place}: {name!r} is no name of an image.")
    check_letters(name, "image", place)
    # Judged as on every system: a data set may be opened on another one than it was written on.
    plain = name.replace("\\", "/")
    if ".." in plain.split("/") or plain.startswith("/") or plain[1:2] == ":":
        raise DataError(
            f"{place}: the image {name!r} leads out of the image folder. Images are named relative to their folder; "
            "say where that is with data.images."
        )
    return name


def find_companion(given: str, beside: Path) -> Path:
    """A file or folder that the settings name: from the working directory or, failing that, from `beside`."""
    for path in (Path(os.path.expanduser(given)), beside / given):
        if path.exists():
            return path
    raise DataError(f"data.images is {given}, which is neither here nor in {beside}.")


def find_image_folder(given: str | None, annotations: Path, first: object, others: Sequence[Path] = ()) -> ImageFolder:
    """The folder of an annotation file's images.

    It is the one that the settings name, else the first of these in which the first image lies: the annotations' own
    folder, `images` in it, the `others`.
    """
    beside = annotations.parent
    if given is not None:
        folder = find_companion(given, beside)
        if not folder.is_dir():
            raise DataError(f"data.images is {folder}, which is no folder of images.")
        return ImageFolder(folder)
    for folder in (beside, beside / "images", *others):
        if isinstance(first, str) and "\0" not in first and os.path.isfile(os.path.join(folder, first)):
            return ImageFolder(folder)
    return ImageFolder(beside)
