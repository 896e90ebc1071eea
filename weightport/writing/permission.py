"""Whether an output may be written where it was asked for: nothing that weightport did not write is replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from weightport.errors import OutputError
from weightport.writing.disk_errors import disk_errors
from weightport.writing.mount_points import is_mounted
from weightport.writing.ownership import RECORD, Stranger, contents, is_own_file, strangers
from weightport.writing.working_places import remove_abandoned

NAMED = 5
"""Files that stand in the way, named in an error."""

Paths = Iterable[str | os.PathLike[str] | None]
"""What an output is made from; what is no path of this machine (None, a Hub id) is passed over."""


def require_directory(target: Path, *, overwrite: bool, inputs: Paths = (), beside: Paths = ()) -> Path:
    """The real path of an output folder, symbolic links followed. Raises OutputError when it may not be written.

    An existing folder may be replaced when it is empty, or with `overwrite` when it holds only what weightport wrote;
    never one that holds an input, the working directory or the home folder. `inputs` are what the output is made
    from: it may not lie in one either; in one of `beside` it may.
    """
    with disk_errors(target):
        real, made_from = Path(os.path.realpath(target)), _existing(inputs)
        _require_apart(target, real, [*made_from, *_existing(beside)])
        _require_outside(target, real, made_from)
        remove_abandoned(real.parent)
        if not os.path.lexists(real):
            return real
        if not real.is_dir():
            raise OutputError(f"{target} is no folder, and the output is one. Choose another output.")
        remove_abandoned(real)
        if not contents(real):
            return real
        if not overwrite:
            raise OutputError(f"{target} exists. Choose another output, or pass --overwrite to replace it.")
        _require_own(target, real)
        return real


def require_file(target: Path, *, overwrite: bool, inputs: Paths = (), beside: Paths = ()) -> Path:
    """The real path of an output file, as `require_directory` has it for folders."""
    with disk_errors(target):
        real, made_from = Path(os.path.realpath(target)), _existing(inputs)
        for each in (*made_from, *_existing(beside)):
            if real.exists() and each.samefile(real):
                raise OutputError(f"{target} is {each}, which is read. Choose another output.")
        _require_outside(target, real, made_from)
        remove_abandoned(real.parent)
        if not os.path.lexists(real):
            return real
        if real.is_dir():
            raise OutputError(f"{target} is a folder, and the output is a file. Choose another output.")
        if not real.is_file():
            raise OutputError(f"{target} is no regular file. Choose another output.")
        if is_mounted(real):
            raise OutputError(f"{target} is mounted as a single file. Mount its folder, or choose another output.")
        if not overwrite:
            raise OutputError(f"{target} exists. Choose another output, or pass --overwrite to replace it.")
        if not is_own_file(real):
            raise OutputError(
                f"{target} was not written by weightport, so that --overwrite does not replace it. Choose another "
                "output, or remove it yourself."
            )
        return real


def _existing(paths: Paths) -> list[Path]:
    return [Path(each) for each in paths if each is not None and os.path.exists(each)]


def _require_apart(target: Path, real: Path, read: Iterable[Path]) -> None:
    """The output is not, and does not hold, what is read, the working directory or the home folder."""
    if not real.exists():
        return
    found = _identity(real)
    home = [(path, "your home folder") for path in _existing([os.path.expanduser("~")])]
    for each, what in (
        *((each, f"{each}, which is read") for each in read),
        (Path.cwd(), "the working directory"),
        *home,
    ):
        if found in _identities_upwards(each):
            verb = "is" if each.samefile(real) else "holds"
            raise OutputError(f"{target} {verb} {what}. Choose another output.")


def _require_outside(target: Path, real: Path, read: Iterable[Path]) -> None:
    above = set(_identities_upwards(real.parent))
    for each in read:
        if each.is_dir() and _identity(each) in above:
            raise OutputError(f"{target} lies in {each}, which is read. Choose an output outside of it.")


def _identities_upwards(path: Path) -> Iterator[tuple[int, int]]:
    """Those of a path and of the folders above it, as far as they exist, symbolic links followed."""
    real = Path(os.path.realpath(path))
    return (_identity(each) for each in (real, *real.parents) if each.exists())


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _strangers_of_one(real: Path) -> list[Stranger]:
    """What in the folder is not weightport's; another run may exchange the folder while it is looked at."""
    while True:
        folder = _identity(real)
        with suppress(FileNotFoundError):
            found = list(islice(strangers(real), NAMED + 1))
            if _identity(real) == folder:
                return found


def _require_own(target: Path, real: Path) -> None:
    found = _strangers_of_one(real)
    if not found:
        return
    if not (real / RECORD).is_file():
        listed = ", ".join(each.path for each in found[:NAMED]) + (", …" if len(found) > NAMED else "")
        raise OutputError(
            f"{target} was not written by weightport (it has no {RECORD}), so that --overwrite does not replace it.\n"
            f"  It holds {listed}. Choose another output, or remove it yourself."
        )
    listed = "".join(f"\n      {each.path} {each.why}" for each in found[:NAMED])
    more = "\n      …" if len(found) > NAMED else ""
    raise OutputError(
        f"{target} holds more than weightport wrote, so that --overwrite does not replace it:{listed}{more}\n"
        "  Move these files elsewhere, or choose another output."
    )
