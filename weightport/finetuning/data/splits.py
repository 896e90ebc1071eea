"""Names of splits, as folders and files bear them."""

from __future__ import annotations

import re

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


def _words(name: str) -> set[str]:
    return {canonical(word) for word in re.findall(r"[a-z]+", name.lower())} | {name.lower()}
