"""Giving a finished file or folder its name in one step of the file system, and getting it onto the disk.

Linux exchanges two names atomically (renameat2 with RENAME_EXCHANGE): whenever the process ends, the target's name
holds the whole old content or the whole new one. Where the kernel or the file system cannot (Linux before 3.15, some
network and FUSE file systems), a file is still replaced in one rename; a folder takes two, the old one standing under
`previous(work)` between them, from where the next run brings it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def give_name(work: Path, target: Path) -> None:
    """Rename `work` to `target`, where nothing, or an empty folder, may stand. Raises FileExistsError."""
    if not work.is_dir():
        if not _renameat2(work, target, _NOREPLACE):
            # A second name appears only where there is none, as a rename that replaces nothing does.
            os.link(work, target)
            os.unlink(work)
    else:
        _rename_onto_empty(work, target)
    sync(target.parent)


def exchange(work: Path, target: Path) -> None:
    """Give `work` the name of `target`, which exists; what stood there is at `work` afterwards, or gone if a file."""
    if not _is_folder(target):
        os.replace(work, target)
    elif not _renameat2(work, target, _EXCHANGE):
        os.rename(target, previous(work))
        try:
            os.rename(work, target)
        except OSError:
            os.rename(previous(work), target)
            raise
        sync(target.parent)
        os.rename(previous(work), work)
    sync(target.parent)


def previous(work: Path) -> Path:
    """Where the target's old content stands while a file system without RENAME_EXCHANGE gives its name to `work`."""
    return work.with_name(f"{work.name}.old")


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; whatever cannot be removed stays."""
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_tree(path: Path) -> None:
    """Return when a file, or a folder with all that is in it, is on the disk."""
    if _is_folder(path):
        for each in sorted(path.rglob("*")):
            if not each.is_symlink():
                sync(each)
    sync(path)


def sync(path: Path) -> None:
    """Return when one file's bytes, or one folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _rename_onto_empty(work: Path, target: Path) -> None:
    """rename(2) of a folder itself refuses to replace anything but an empty folder. Raises FileExistsError then."""
    try:
        os.rename(work, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Whether the system could; False where it knows no such call. Raises OSError when the call fails."""
    call = _system_call()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))


def _system_call() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """renameat2 of the C library (glibc from 2.28, musl from 1.2.6); None where it has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    call: Callable[[int, bytes, int, bytes, int], int] = function
    return call
