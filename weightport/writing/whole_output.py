"""Outputs that appear whole or not at all.

Work goes into a hidden sibling of the target, is synced to disk, and takes the target's name in one rename. Whatever
ends the process earlier, the target's name holds what it held before. A sibling left by a killed process is recognised
by its released lock and removed by the next run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightport.errors import OutputError

_LOCK = ".weightport-lock"


@contextmanager
def whole_directory(target: Path, *, overwrite: bool = False, needs: int = 0) -> Iterator[Path]:
    """A working folder that becomes `target` when the block ends well, and vanishes when it does not.

    `needs`: bytes that will be written, checked against the free space first. Raises OutputError.
    """
    target = Path(os.path.abspath(target))
    check_absent(target, overwrite=overwrite)
    _check_space(target.parent, needs)
    _remove_abandoned(target)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    lock = os.open(work / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _disk_errors(target):
            yield work
            (work / _LOCK).unlink()
            work.chmod(0o777 & ~_umask())
            _sync_tree(work)
            # Again: another run may have finished first.
            check_absent(target, overwrite=overwrite)
            _take_place(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def whole_file(target: Path, *, overwrite: bool = False, needs: int = 0) -> Iterator[Path]:
    """A working path that becomes the file `target` when the block ends well. Raises OutputError."""
    target = Path(os.path.abspath(target))
    check_absent(target, overwrite=overwrite)
    _check_space(target.parent, needs)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(target), dir=target.parent)
    os.close(handle)
    work = Path(name)
    try:
        with _disk_errors(target):
            yield work
            work.chmod(0o666 & ~_umask())
            _sync(work)
            check_absent(target, overwrite=overwrite)
            work.replace(target)
            _sync(target.parent)
    except BaseException:
        with suppress(OSError):
            work.unlink()
        raise


def check_absent(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError when `target` exists and may not be replaced (an empty folder may)."""
    if overwrite or not (target.exists() or target.is_symlink()):
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    raise OutputError(f"{target} exists. Choose another output, or pass --overwrite to replace it.")


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_space(folder: Path, needs: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needs > free:
        raise OutputError(f"{existing} has {free:,} bytes free, and {needs:,} are needed. Nothing was written.")


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "the folder is not writable",
            errno.EPERM: "the folder is not writable",
            errno.EROFS: "the file system is read-only",
            errno.ENOTDIR: "a part of the path is a file",
            errno.EEXIST: "a part of the path is a file",
            errno.EISDIR: "it is a folder",
            errno.ENAMETOOLONG: "the name is too long",
        }.get(error.errno or 0)
        if reason is None:
            raise
        raise OutputError(f"Cannot write {target}: {reason}. Nothing was left behind.") from error


def _remove_abandoned(target: Path) -> None:
    """Remove working folders of earlier runs whose process is gone: their lock can be taken."""
    if not target.parent.is_dir():
        return
    for folder in target.parent.glob(_prefix(target).replace("[", "[[]") + "*"):
        lock = folder / _LOCK
        if not lock.is_file():
            continue
        with suppress(OSError):
            handle = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _take_place(work: Path, target: Path) -> None:
    """Give `work` the name `target`; what stood there is set aside first and removed last."""
    aside: Path | None = None
    if target.is_symlink() or target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent)) / target.name
        target.rename(aside)
    try:
        work.rename(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
            aside.parent.rmdir()
        raise
    _sync(target.parent)
    if aside is not None:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)
