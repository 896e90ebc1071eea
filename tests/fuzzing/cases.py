"""A fuzzing case: the files of one input, by their names relative to a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

Case = Mapping[str, bytes]


def write(case: Case, folder: Path) -> None:
    """Make `folder` hold the files of `case` and nothing else."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name not in case:
            os.unlink(entry.path)
    os.makedirs(folder, exist_ok=True)
    for name, data in case.items():
        path = f"{folder}/{name}"
        if "/" in name:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def read(folder: Path, skip: Iterable[str] = ()) -> dict[str, bytes]:
    """The files below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skip
    }


def size(case: Case) -> int:
    return sum(map(len, case.values()))


def digest(case: Case) -> str:
    """Eight hexadecimal digits of the content."""
    found = hashlib.sha256()
    for name in sorted(case):
        found.update(name.encode("utf-8", "surrogateescape") + b"\0" + case[name] + b"\0")
    return found.hexdigest()[:8]
