"""Images in files: found by the names that annotations give them, and only inside the folders that are allowed."""

from __future__ import annotations

import os
import re
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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""How names of picture files end, where no annotation says which files are pictures."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


@dataclass(frozen=True)
class ImageFile:
    """Reads a file that was found in its folder."""

    path: str

    def __call__(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


class ImageFolder:
    """The folders that image names are relative to, the first one that holds a name first.

    A name from inside a data set may not lead out of them, neither by being absolute, nor by "..", nor through a
    symbolic link. Where `roots` were named by the user, absolute names and links may lead into any of them: "/" allows
    all.
    """

    def __init__(self, *paths: Path, roots: Sequence[Path] = ()) -> None:
        self.paths = paths
        self.absolute = bool(roots)
        self._real = tuple(os.path.realpath(path) for path in (*paths, *roots))
        self._checked: set[str] = set()

    def __str__(self) -> str:
        return " or ".join(map(str, self.paths))

    @property
    def identity(self) -> object:
        """What changes with all of the folder at once: each image is looked at on its own."""
        return None

    def look_up(self, name: Any, place: str) -> tuple[str, int, int]:
        """The name of an image, the bytes of its file, and the time of the file's last change in nanoseconds."""
        _, size, modified = self.find(name, place)
        return name, size, modified

    def find(self, name: Any, place: str) -> tuple[str, int, int]:
        """Path of the image file `name`, its bytes, and the time of its last change in nanoseconds.

        Raises DataError when the name leads outside or nowhere, or to an empty file.
        """
        safe = self._safe_name(name, place)
        missing: OSError | None = None
        for folder in self.paths:
            path = os.path.join(folder, safe)
            try:
                found = self._stat(path, name, place)
            except OSError as error:
                missing = missing or error
                continue
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{place}: the image {name!r} in {folder} is no file.")
            if not found.st_size:
                raise DataError(f"{place}: the image {name!r} in {folder} is an empty file.")
            return path, found.st_size, found.st_mtime_ns
        reason = missing.strerror if missing is not None else "no folder"
        raise DataError(f"{place}: the image {name!r} is not in {self}: {reason}.") from missing

    def picture(self, name: Any, place: str) -> Picture:
        return Picture(PurePosixPath(name).as_posix(), place, ImageFile(self.find(name, place)[0]))

    def _stat(self, path: str, name: str, place: str) -> os.stat_result:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            self._check_inside(path, name, place)
            return os.stat(path)
        if (parent := os.path.dirname(path)) not in self._checked:
            self._check_inside(path, name, place)
            if len(self._checked) < MOST_CHECKED:
                self._checked.add(parent)
        return found

    def _check_inside(self, path: str, name: str, place: str) -> None:
        real = os.path.realpath(path)
        if any(os.path.commonpath((real, folder)) == folder for folder in self._real):
            return
        if os.path.isabs(name) and not os.path.islink(path):
            raise DataError(
                f"{place}: the image {name!r} leads out of {self}. Add the folder that it is in to data.images."
            )
        raise DataError(
            f"{place}: the image {name!r} leads out of {self} through a symbolic link, to {real}. "
            "Name the folder that holds the images with data.images."
        )

    def _safe_name(self, name: Any, place: str) -> str:
        if not isinstance(name, str):
            alone = " Rows of text alone are taken with data.text_only=true." if name is None else ""
            raise DataError(f"{place}: the name of an image was expected, found {kind_of(name)}.{alone}")
        if not name.strip() or "\0" in name:
            raise DataError(f"{place}: {name!r} is no name of an image.")
        check_letters(name, "image", place)
        if found := _URL.match(name):
            raise DataError(
                f"{place}: the image {name[:60]!r} is a URL ({found[0]}). Pictures are read from files: "
                "download them, and name the files."
            )
        # Judged as on every system: a data set may be opened on another one than it was written on.
        plain = name.replace("\\", "/")
        if self.absolute and name.startswith("/") and ".." not in plain.split("/"):
            return name
        if ".." in plain.split("/") or plain.startswith("/") or plain[1:2] == ":":
            raise DataError(
                f"{place}: the image {name!r} leads out of the image folder. Images are named relative to their "
                "folder; say where that is with data.images, and allow absolute names with data.images=/ (or the "
                "folders that they may be in)."
            )
        return name


def find_companion(given: str, beside: Path) -> Path:
    """A file or folder that the settings name: from the working directory or, failing that, from `beside`."""
    for path in (Path(os.path.expanduser(given)), beside / given):
        if path.exists():
            return path
    raise DataError(f"data.images is {given}, which is neither here nor in {beside}.")


def find_image_folder(
    given: Sequence[str] | None, annotations: Path, first: object, others: Sequence[Path] = ()
) -> ImageFolder:
    """The folders of an annotation file's images.

    They are those that the settings name, but for "/". Where there are none, it is the first of these in which the
    first image lies: the annotations' own folder, `images` in it, the `others`.
    """
    beside = annotations.parent
    roots = [_folder(each, beside) for each in given or ()]
    folders = [each for each in roots if each != Path("/")]
    if folders:
        return ImageFolder(*folders, roots=roots)
    for folder in (beside, beside / "images", *others):
        if isinstance(first, str) and "\0" not in first and os.path.isfile(os.path.join(folder, first)):
            return ImageFolder(folder, roots=roots)
    return ImageFolder(beside, roots=roots)


def _folder(given: str, beside: Path) -> Path:
    found = find_companion(given, beside)
    if not found.is_dir():
        raise DataError(f"data.images is {found}, which is no folder of images.")
    return found
