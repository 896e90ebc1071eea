"""Output folders that cannot be renamed, such as mount points (a container's volume): their content is exchanged.

The finished files wait in a hidden folder within the mount point. What stood there is moved aside, they are moved up,
and the hidden folder goes: that removal is the moment from which the output is the new one. `undo` brings a killed
exchange back to the old content, or completes it after that moment.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from weightport.writing.exchange import previous, remove, sync
from weightport.writing.ownership import RECORD, contents, read_record

_ESCAPED = re.compile(r"\\([0-7]{3})")


def fills_in_place(folder: Path) -> bool:
    """Whether an output folder cannot be renamed: it is a mount point, or stands where nothing may be renamed."""
    if not folder.is_dir():
        return False
    return is_mounted(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def is_mounted(path: Path) -> bool:
    """Whether a real path is a mount point, bind mounts of one file system and of single files included."""
    return os.path.ismount(path) or str(path) in _mounted()


def exchange_contents(work: Path, target: Path) -> None:
    """Put the content of `work`, a folder in `target`, into `target`; what stood there is in `work` afterwards."""
    moving = _moving(work)
    moving.mkdir()
    for path in contents(target):
        path.rename(moving / path.name)
    # From here on, whatever stands in the target is new.
    moving.rename(previous(work))
    # The record goes last: it names what has to be taken out again.
    for path in sorted(work.iterdir(), key=lambda path: path.name == RECORD):
        path.rename(target / path.name)
    sync(target)
    work.rmdir()
    previous(work).rename(work)
    sync(target)


def undo(work: Path, target: Path) -> None:
    """Take back an exchange that did not come to its end."""
    if _moving(work).is_dir():
        _move_all(_moving(work), target)
    elif previous(work).is_dir() and not work.is_dir():
        previous(work).rename(work)
    elif previous(work).is_dir() and not any(work.iterdir()):
        work.rmdir()
        previous(work).rename(work)
    elif previous(work).is_dir():
        record = read_record(work)
        names = {RECORD, *(Path(name).parts[0] for name in (record.files if record else ()))}
        for name in names:
            if not (work / name).exists():
                remove(target / name)
        # As before the first new file: should this end too, the next one goes on moving.
        previous(work).rename(_moving(work))
        _move_all(_moving(work), target)


def _moving(work: Path) -> Path:
    return work.with_name(f"{work.name}.moving")


def _move_all(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)
    source.rmdir()


def _mounted() -> frozenset[str]:
    found: set[str] = set()
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            found.add(_ESCAPED.sub(lambda match: chr(int(match.group(1), 8)), fields[4]))
    return frozenset(found)
