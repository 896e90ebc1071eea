"""Names of splits, as folders and files bear them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from weightport.errors import DataError

_SAME = {"training": "train", "val": "valid", "validation": "valid", "dev": "valid", "eval": "valid"}
KNOWN = ("train", "valid", "test")


def canonical(split: str) -> str:
    """One name for a split: `val`, `validation`, `dev` and `eval` are `valid`."""
    return _SAME.get(split.lower(), split.lower())


def names_split(name: str, split: str) -> bool:
    """Whether a file's or folder's name says that it is of this split: train2017, IC_train.jsonl, valid-00000-of-1."""
    return canonical(split) in _words(name)


def split_named(name: str) -> str | None:
    """The known split that a name speaks of, or None."""
    words = _words(name)
    return next((split for split in KNOWN if split in words), None)


def is_of_split(path: Path, split: str) -> bool:
    """Whether a file is of this split: by its own name or, where that speaks of none, by its folder's."""
    if split_named(path.stem) is not None or names_split(path.stem, split):
        return names_split(path.stem, split)
    return names_split(path.absolute().parent.name, split)


def named_splits(paths: Iterable[Path]) -> list[str]:
    """The splits that names of files, or else of their folders, speak of."""
    found = (split_named(path.stem) or split_named(path.absolute().parent.name) for path in paths)
    return sorted({split for split in found if split is not None})


def no_split(place: object, wanted: str, found: Iterable[str]) -> DataError:
    """The error for a split that is not there: training data would be measured in its place."""
    names = ", ".join(dict.fromkeys(found))
    there = f"Found: {names}." if names else "Found: no splits, one whole."
    return DataError(f"{place} has no split {wanted}. {there} Choose what there is, or give it without a split.")


def _words(name: str) -> set[str]:
    return {canonical(word) for word in re.findall(r"[a-z]+", name.lower())} | {name.lower()}
