"""Errors of writing, each as one OutputError that says what the disk refused, whichever library was writing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightport.errors import OutputError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grows beyond what the file system, or the shell's limit (ulimit -f), allows",
    errno.EROFS: "the file system is read-only",
}
"""What only writing runs into, whatever file the error names."""

_REASONS = _FULL | {
    errno.EACCES: "the folder is not writable",
    errno.EPERM: "the folder is not writable",
    errno.ENOENT: "its folder was removed meanwhile",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.EISDIR: "it is a folder",
    errno.ENOTEMPTY: "another process wrote into it meanwhile",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EILSEQ: "the file system does not take such a name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EBUSY: "it is in use, as a mount point perhaps",
    errno.ETXTBSY: "it is a program that runs",
    errno.EXDEV: "it lies on another file system than the folder it stands in",
    errno.EIO: "the disk, or the share it is on, failed (input/output error)",
    errno.ENXIO: "the disk is gone",
    errno.ENODEV: "the disk is gone",
    errno.ESTALE: "the network share lost the file",
    errno.ENOTCONN: "the network share is not connected",
    errno.EREMOTEIO: "the network share failed",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}
_IN_WORDS = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of writing `target` into OutputError; those of reading other files pass through."""
    try:
        yield
    except OSError as error:
        reason = _reason(error, target)
        if reason is None:
            raise
        raise OutputError(f"Cannot write {target}: {reason}. Nothing was left behind.") from error
    except Exception as error:
        # safetensors and tokenizers write in Rust and give the number of the system's error in words only; tokenizers'
        # errors are of no type of their own.
        rust = type(error) is Exception or type(error).__module__.startswith("safetensors")
        found = _IN_WORDS.search(str(error)) if rust else None
        if found is None:
            raise
        reason = _REASONS.get(int(found.group(1)), os.strerror(int(found.group(1))))
        raise OutputError(f"Cannot write {target}: {reason}. Nothing was left behind.") from error


def _reason(error: OSError, target: Path) -> str | None:
    """What happened, in words; None for an error that is not of writing `target`."""
    code = error.errno or 0
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if code not in _FULL and named and not any(_belongs(Path(os.path.abspath(name)), target) for name in named):
        return None
    return _REASONS.get(code)


def _belongs(path: Path, target: Path) -> bool:
    """Whether `path` is the target, something in it, a folder above it, or a working file beside it."""
    if path == target or target in path.parents or path in target.parents:
        return True
    return any(part.startswith(".") and ".weightport-" in part for part in path.parts)
