"""Hidden working files and folders beside an output, each with a lock, and the removal of what killed runs left.

The lock is made first and removed last, so that nothing is ever left without one; the system releases it with the
process. Every run first looks through the folder that it writes to: what a released lock belongs to is taken back and
removed, whichever output it was for. Where the file system has no locks (some network shares), nothing is removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from weightport.writing.exchange import exchange, previous, remove
from weightport.writing.mount_points import exchange_contents, fills_in_place, undo
from weightport.writing.ownership import read_record, write_record

_LOCK = re.compile(r"(\..*\.weightport-[0-9a-f]{16})\.lock")
_LONGEST = 180
"""Bytes of an output's name that its working files repeat; a longer one is hashed, to stay below 255."""


@contextmanager
def working_place(target: Path) -> Iterator[Path]:
    """A hidden path where `target` is prepared, on the same file system; what stands there at the end is removed."""
    inside = fills_in_place(target)
    folder = target if inside else target.parent
    remove_abandoned(folder)
    handle, work = _locked(folder, target, inside)
    try:
        yield work
    finally:
        try:
            _clear(work, target)
            # What could not be brought back or removed, the next run finds by its lock.
            if not os.path.lexists(work):
                with suppress(OSError):
                    _lock_of(work).unlink()
        finally:
            os.close(handle)


def exchange_with(work: Path, target: Path) -> None:
    """Exchange the finished `work` with `target`, which exists; what stood there is at `work` afterwards."""
    if work.parent == target:
        exchange_contents(work, target)
    else:
        exchange(work, target)


def bring_back(work: Path, target: Path) -> None:
    """Give the output that was set aside at `work` its name again, with the folders that the new one took along."""
    record = read_record(target)
    exchange_with(work, target)
    for name in record.carried if record is not None else ():
        move_along(work, target, name)


def move_along(source: Path, target: Path, name: str) -> None:
    """Move the folder `name` from `source` to `target`, unless that has one of its own."""
    if (source / name).is_dir() and not os.path.lexists(target / name):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target / name)


def remove_abandoned(folder: Path) -> None:
    """Take back and remove what killed runs left in `folder`: their locks are free."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        found = _LOCK.fullmatch(name)
        if found is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):
                _take_over(folder / name, folder / found.group(1))


def _take_over(lock: Path, work: Path) -> None:
    handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_same(handle, lock):
            return
        text = os.read(handle, 1 << 16)
        # Killed before it had said what for, it had made nothing else.
        if text:
            said = json.loads(text)
            _clear(work, work.parent if said["inside"] else work.parent / os.path.basename(said["target"]))
        lock.unlink()
    finally:
        os.close(handle)


def _clear(work: Path, target: Path) -> None:
    """Bring back what an unfinished exchange set aside, then remove what is left at `work`."""
    if work.parent == target:
        undo(work, target)
    elif os.path.lexists(previous(work)):
        if not os.path.lexists(target):
            previous(work).rename(target)
        elif not os.path.lexists(work):
            previous(work).rename(work)
    record = read_record(target)
    if record is not None and record.replaces == work.name:
        if os.path.lexists(work):
            bring_back(work, target)
        else:
            write_record(target, replace(record, replaces=""))
    remove(work)


def _locked(folder: Path, target: Path, inside: bool) -> tuple[int, Path]:
    """(the open lock, the working path that it stands for)."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    while True:
        work = folder / f".{name}.weightport-{secrets.token_hex(8)}"
        lock = _lock_of(work)
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another run took it for an abandoned one, and removes it.
            os.close(handle)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(handle)
                raise
        if _is_same(handle, lock):
            os.write(handle, json.dumps({"target": target.name, "inside": inside}).encode())
            return handle, work
        os.close(handle)


def _lock_of(work: Path) -> Path:
    return work.with_name(f"{work.name}.lock")


def _is_same(handle: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        found, opened = os.stat(path, follow_symlinks=False), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)
