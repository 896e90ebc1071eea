"""A folder that a long run fills in place, and the earlier run that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from weightport.errors import OutputError
from weightport.writing.disk_errors import disk_errors
from weightport.writing.exchange import remove, sync
from weightport.writing.ownership import contents, read_record, record_folder, write_record
from weightport.writing.permission import Paths, require_directory
from weightport.writing.whole_output import take_place
from weightport.writing.working_places import move_along, working_place


@contextmanager
def replaced_directory(
    target: Path,
    fill: Callable[[Path], None],
    *,
    overwrite: bool = False,
    inputs: Paths = (),
    beside: Paths = (),
    also: Sequence[str] = (),
    carried: Sequence[str] = (),
) -> Iterator[Callable[[], None]]:
    """`target` as a new folder, with what `fill` puts into it at first, for the block to fill on.

    Yields `keep`, to be called when the new folder is worth more than what stood there: that is removed then, and not
    before. Where the block fails earlier, it comes back; where the process is killed, by the next run that looks
    there. A block that ends well is kept. `also`: patterns of paths that are weightport's whatever they hold;
    `carried`: folders of the old content that the new one takes over. Raises OutputError as `require_directory`.
    """
    look = partial(require_directory, target, overwrite=overwrite, inputs=tuple(inputs), beside=tuple(beside))
    real = look()
    with disk_errors(target):
        real.parent.mkdir(parents=True, exist_ok=True)
    with _working_place(real, target) as work:
        with disk_errors(target):
            replaced = real.is_dir() and bool(contents(real))
            work.mkdir()
            fill(work)
            record_folder(work, also, work.name if replaced else "", carried)
            take_place(work, real, look, overwrite=overwrite)
            for name in carried:
                move_along(work, real, name)
        kept = False

        def keep() -> None:
            nonlocal kept
            record = read_record(real)
            if not kept and record is not None:
                write_record(real, replace(record, replaces="", carried=()))
                sync(real)
            kept = True
            # What stood there is of no use from here on; it may take many gigabytes.
            remove(work)

        try:
            yield keep
        except BaseException:
            if not kept and not replaced:
                for path in contents(real):
                    remove(path)
                with suppress(OSError):
                    real.rmdir()
            raise
        keep()


@contextmanager
def _working_place(real: Path, target: Path) -> Iterator[Path]:
    """`working_place`, whose own errors are those of writing `target`; those of the block pass as they are."""
    failure: BaseException | None = None
    try:
        with disk_errors(target), working_place(real) as work:
            try:
                yield work
            except BaseException as error:
                failure = error
    except OutputError:
        # What failed first is what is told; what could not be cleared is left to the next run.
        if failure is None:
            raise
    if failure is not None:
        raise failure
