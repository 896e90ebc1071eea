"""Class folders: pictures in folders whose names are the answers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.columns import check_letters
from weightport.finetuning.data.content_keys import Tick, keys_by_content
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import EXTENSIONS, ImageFolder
from weightport.finetuning.data.packed_texts import PackedTexts
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.splits import split_named


class ClassFolders:
    """The pictures in a folder's folders, at any depth. The answer is the name of the outermost one, as it is written.

    Opening lists the folders; no picture is decoded.
    """

    each_answer = False

    def __init__(self, path: Path, settings: DataSettings) -> None:
        self.name = str(path)
        self.images = ImageFolder(path, roots=[Path(os.path.expanduser(each)) for each in settings.images or ()])
        self.classes = class_folders(path)
        faults = Faults(settings.skip_bad)
        names: list[str] = []
        labels: list[int] = []
        stamps: list[tuple[int, int]] = []
        for label, folder in enumerate(self.classes):
            before = len(names)
            check_letters(folder, "class", self.name)
            for name in picture_names(path, folder):
                try:
                    _, size, modified = self.images.find(name, f"{self.name}, class {folder}")
                except DataError as fault:
                    faults.add(fault)
                    continue
                names.append(name)
                labels.append(label)
                stamps.append((size, modified))
            if len(names) == before:
                raise DataError(f"{path / folder}: no picture of the class {folder!r} ({', '.join(EXTENSIONS)}).")
        named = ", ".join(self.classes[:10]) + (" …" if len(self.classes) > 10 else "")
        self.notes = (f"{path}: answers are the names of its {len(self.classes)} folders ({named})",)
        self.file_names, self.labels = PackedTexts(names), np.array(labels, dtype=np.int32)
        self.answer_counts = np.ones(len(names), dtype=np.int32)
        self.question_keys = np.arange(len(names), dtype=np.int64)
        self.skipped = tuple(faults.skipped)
        said = hashlib.sha256(self.file_names.content.tobytes() + self.file_names.ends.tobytes()).hexdigest()
        self.content = fingerprint_of(["folders", said, [size for size, _ in stamps]])
        self.fingerprint = fingerprint_of(["folders", os.path.abspath(path), asdict(settings), said, stamps])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        names = np.array([key_of(self.file_names[row].encode()) for row in range(len(self.labels))], dtype=np.int64)
        return keys_by_content(names, self.entry, tick)

    def entry(self, row: int) -> Entry:
        name = self.file_names[row]
        place = f"{self.name}, {name}"
        return Entry(place, self.images.picture(name, place), "", (self.classes[self.labels[row]],))


def class_folders(path: Path) -> list[str]:
    """The folders in `path` but for hidden ones, in order."""
    found = (entry.name for entry in os.scandir(path) if entry.is_dir())
    return sorted(name for name in found if not name.startswith((".", "__")))


def without_pictures(path: Path) -> str:
    """What a message says of the folders in `path` that keep the others, which hold pictures, from being classes;
    empty where none or all of them lack pictures. Only files right in them are looked at."""
    folders = class_folders(path)
    empty = [name for name in folders if not any(_is_picture(entry.name) for entry in os.scandir(path / name))]
    if not empty or len(empty) == len(folders):
        return ""
    names, hold = ", ".join(empty[:10]) + (" …" if len(empty) > 10 else ""), "holds" if len(empty) == 1 else "hold"
    return f" Of its folders, {names} {hold} no picture: where they are classes, fill or remove what is empty."


def are_class_folders(path: Path, *, asked_for: bool) -> bool:
    """Whether the folders in `path` are classes: several, each with a picture in it, and no splits; where class
    folders were `asked_for`, a single one too. Raises DataError for some that are called like splits beside some that
    are not.
    """
    folders = class_folders(path)
    splits = [name for name in folders if split_named(name)]
    if len(folders) < (1 if asked_for else 2) or len(splits) == len(folders):
        return False
    if not all(next(_picture_names(path, name), None) for name in folders):
        return asked_for
    if splits and not asked_for:
        raise DataError(
            f"{path}: {', '.join(splits)} may be a class or a part, beside {', '.join(set(folders) - set(splits))}. "
            "Say data.reader=folders where all of them are classes."
        )
    return True


def picture_names(path: Path, folder: str) -> list[str]:
    """The names of the picture files below `folder`, relative to `path`, in order. Links to folders are not followed
    within: they can lead in circles."""
    return sorted(_picture_names(path, folder))


def _picture_names(path: Path, folder: str) -> Iterator[str]:
    for inside, _, files in os.walk(path / folder):
        for name in files:
            if _is_picture(name):
                yield os.path.relpath(os.path.join(inside, name), path)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
