"""Names of several files in one: braces and wildcards, as shells expand them."""

from __future__ import annotations

import glob
import itertools
import os
import re

from weightport.errors import DataError, MissingDataError

MOST = 100_000
"""Names that a pattern may stand for."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """The paths that a path with braces (`{0000..0127}`, `{a,b}`) and wildcards (`*`, `?`, `[0-9]`, `**`) means, in
    the order of the braces, those of a wildcard sorted. A path that exists as it is written is that path.

    Raises MissingDataError for a wildcard that fits nothing, DataError for braces that stand for too many names.
    """
    path = os.path.expanduser(pattern)
    if os.path.lexists(path):
        return [pattern]
    found = []
    for name in _without_braces(path):
        if not glob.has_magic(name) or os.path.lexists(name):
            found.append(name)
            continue
        files = sorted(glob.glob(name, recursive=True))
        if not files:
            raise MissingDataError(f"{name}: no file fits this pattern. Looked from {os.getcwd()}.")
        found += files
    return found


def has_pattern(path: str) -> bool:
    """Whether a path is a pattern that is no file's own name."""
    is_pattern = glob.has_magic(path) or _BRACES.search(path) is not None
    return is_pattern and not os.path.lexists(os.path.expanduser(path))


def has_braces(path: str) -> bool:
    """Whether braces of a path stand for several names."""
    return len(_without_braces(path)) > 1


def _without_braces(pattern: str) -> list[str]:
    parts = _BRACES.split(pattern)
    if len(parts) == 1:
        return [pattern]
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    total = 1
    for each in choices:
        total *= len(each)
    if total > MOST:
        raise DataError(f"{pattern} stands for {total:,} names. Up to {MOST:,} were expected.")
    return ["".join(each) for each in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """`0000..0127` → 0000, 0001, …; `a,b` → a, b."""
    limits = _RANGE.fullmatch(inside)
    if limits is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = int(limits[1]), int(limits[2])
    if abs(last - first) >= MOST:
        raise DataError(f"{{{inside}}} stands for {abs(last - first) + 1:,} names. Up to {MOST:,} were expected.")
    width = max(len(limits[1]), len(limits[2])) if limits[1].startswith("0") or limits[2].startswith("0") else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}}" for number in range(first, last + step, step)]
