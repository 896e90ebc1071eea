"""Outputs that appear whole or not at all.

Work goes into a hidden sibling of the target, is synced to disk, and takes the target's name in one step. Whatever
ends the process earlier, the target's name holds what it held before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from weightport.errors import OutputError
from weightport.writing.disk_errors import disk_errors
from weightport.writing.exchange import give_name, sync, sync_tree
from weightport.writing.ownership import is_edited, record_file, record_folder
from weightport.writing.permission import Paths, require_directory, require_file
from weightport.writing.working_places import exchange_with, working_place


@contextmanager
def whole_directory(
    target: Path, *, overwrite: bool = False, inputs: Paths = (), beside: Paths = (), needs: int = 0
) -> Iterator[Path]:
    """A working folder that becomes `target` when the block ends well, and vanishes when it does not.

    `overwrite`, `inputs`, `beside`: as `require_directory` has them. `needs`: bytes that will be written, checked
    against the free space first. Raises OutputError.
    """
    inputs, beside = tuple(inputs), tuple(beside)
    look = partial(require_directory, target, overwrite=overwrite, inputs=inputs, beside=beside)
    real = look()
    require_space(real.parent, needs)
    with disk_errors(target):
        real.parent.mkdir(parents=True, exist_ok=True)
        with working_place(real) as work:
            work.mkdir(0o700)
            yield work
            record_folder(work)
            work.chmod(0o777 & ~_umask())
            sync_tree(work)
            take_place(work, real, look, overwrite=overwrite)


@contextmanager
def whole_file(
    target: Path, *, overwrite: bool = False, inputs: Paths = (), beside: Paths = (), needs: int = 0
) -> Iterator[Path]:
    """A working path that becomes the file `target` when the block ends well. Raises OutputError as `require_file`."""
    inputs, beside = tuple(inputs), tuple(beside)
    look = partial(require_file, target, overwrite=overwrite, inputs=inputs, beside=beside)
    real = look()
    require_space(real.parent, needs)
    with _file_at_work(target, real) as work:
        yield work
        _finish_file(work)
        take_place(work, real, look, overwrite=overwrite)
        record_file(real)


@contextmanager
def own_file(target: Path) -> Iterator[Path]:
    """As `whole_file`, for a file within a folder that weightport keeps: an earlier one is replaced unasked.

    One that somebody edited stays theirs: `--overwrite` of the folder still names it.
    """
    real = Path(os.path.realpath(target))
    edited = is_edited(real)
    with _file_at_work(target, real) as work:
        yield work
        _finish_file(work)
        work.replace(real)
        sync(real.parent)
        if not edited:
            record_file(real)


def take_place(work: Path, target: Path, look: Callable[[], Path], *, overwrite: bool) -> None:
    """Give what is finished at `work` its name; what stood there is at `work` afterwards.

    `look` looks again whether that is allowed: another run may have finished first, or the user have put something
    there. Raises OutputError when it is not.
    """
    while True:
        look()
        replaced = overwrite and target.exists()
        try:
            if work.parent == target or replaced:
                exchange_with(work, target)
            else:
                give_name(work, target)
            return
        except FileExistsError as error:
            # Written between that look and the name.
            if not overwrite:
                raise OutputError(f"{target} exists: another run has written it meanwhile.") from error
        except FileNotFoundError:
            # Removed between that look and the exchange.
            if not replaced or target.exists():
                raise


def require_space(folder: Path, needs: int) -> None:
    """Raises OutputError when the disk that `folder` will be on has fewer free bytes than `needs`."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needs > free:
        raise OutputError(f"{existing} has {free:,} bytes free, and {needs:,} are needed. Nothing was written.")


@contextmanager
def _file_at_work(target: Path, real: Path) -> Iterator[Path]:
    with disk_errors(target):
        real.parent.mkdir(parents=True, exist_ok=True)
        with working_place(real) as work:
            os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield work


def _finish_file(work: Path) -> None:
    work.chmod(0o666 & ~_umask())
    sync_tree(work)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
