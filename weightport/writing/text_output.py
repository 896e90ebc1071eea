"""Reports, which may also go to standard output, a pipe or a device: these are written through, never replaced."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from weightport.errors import OutputError
from weightport.writing.disk_errors import disk_errors
from weightport.writing.permission import Paths, require_file
from weightport.writing.whole_output import whole_file

_STDOUT = frozenset({"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})


def is_stdout(target: Path) -> bool:
    """Whether a report for `target` is printed: `-`, or one of the system's names for standard output."""
    return str(target) in _STDOUT


def require_text_output(target: Path, *, overwrite: bool, beside: Paths = ()) -> None:
    """Raises OutputError when a report may not be written to `target`: before the work that it reports on."""
    if is_stdout(target):
        return
    if not _is_written_through(target):
        require_file(target, overwrite=overwrite, beside=beside)
    elif stat.S_ISBLK(os.stat(target).st_mode):
        raise OutputError(f"{target} is a disk, and a report would destroy what is on it. Choose a file.")


def write_text(target: Path, text: str, *, overwrite: bool, beside: Paths = ()) -> bool:
    """Write a report as UTF-8: a regular file whole or not at all, anything else as it is. Returns whether it stands
    in a file. Raises OutputError."""
    beside = tuple(beside)
    require_text_output(target, overwrite=overwrite, beside=beside)
    if is_stdout(target):
        sys.stdout.write(text)
        sys.stdout.flush()
        return False
    if _is_written_through(target):
        with disk_errors(target), target.open("w", encoding="utf-8") as file:
            file.write(text)
        return False
    with whole_file(target, overwrite=overwrite, beside=beside) as work:
        work.write_text(text, encoding="utf-8")
    return True


def _is_written_through(target: Path) -> bool:
    """A device, a pipe, a socket, or a file that is open already (/dev/fd/3); symbolic links are followed."""
    if os.path.abspath(target).startswith(("/dev/fd/", "/proc/", "/dev/std")):
        return True
    try:
        found = os.stat(target)
    except OSError:
        return False
    return not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode)
