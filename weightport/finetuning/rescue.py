"""Where a trained model goes when its run's disk does not take it: a process that ends cannot keep it in memory."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from weightport.errors import OutputError
from weightport.formatting import size

WRITING = (OSError, RuntimeError, SafetensorError, OutputError)
"""What the libraries that write raise for a disk that is full, read-only or gone."""

MARGIN = 2**25
"""Bytes beside the weights: tokenizer, answers, report."""

_SIGNS_OF_A_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")
"""safetensors and torch.save say so in words only."""


_FAILING = {
    errno.EIO: "input/output error",
    errno.EROFS: "it is read-only",
    errno.ESTALE: "the network share lost a file",
    errno.ENOTCONN: "the network share is not connected",
    errno.EREMOTEIO: "the network share failed",
    errno.ENXIO: "it is gone",
    errno.ENODEV: "it is gone",
}
_SIGN_OF_A_FAILING_DISK = "basic_ios::clear"
"""torch.save's, of a stream that did not take what was written."""


def disk_fault(error: BaseException | None) -> str | None:
    """What the disk did that is behind an error, to be said after "The disk of a run"; None where it is another's."""
    if is_full_disk(error):
        return "is full"
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FAILING:
            return f"failed, or one that is read from ({_FAILING[error.errno]})"
        if isinstance(error, RuntimeError) and _SIGN_OF_A_FAILING_DISK in str(error):
            return "did not take what was written (it is full, or failed)"
        error = error.__cause__
    return None


def is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk or a used-up quota is what is behind an error, whichever library was writing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, WRITING) and any(sign in str(error) for sign in _SIGNS_OF_A_FULL_DISK):
            return True
        error = error.__cause__
    return False


def rescued(run: Path, write: Callable[[Path], None], weights: int, error: BaseException) -> OutputError:
    """Let `write` put the result, whose weights are that many bytes, into a new folder where there is room, and return
    the error that says where it is. `error`: why it is not in the folder `run`."""
    reason = f"The disk of {run} is full" if is_full_disk(error) else str(error).rstrip(". ")
    needs, tried = weights + MARGIN, []
    for folder in _places():
        with suppress(*WRITING):
            if shutil.disk_usage(folder).free < needs:
                tried.append(str(folder))
                continue
            place = Path(tempfile.mkdtemp(prefix=f"weightport-{run.name}-", dir=folder))
            try:
                write(place)
                _copy_records(run, place)
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                tried.append(str(folder))
                raise
            whole, wanted = shlex.quote(str(place)), shlex.quote(f"{run}-rescued")
            return OutputError(
                f"{reason}. The trained model is whole, with its records, in {place}.\n"
                f"  Make room, or choose another disk, and copy it: cp -r {whole} {wanted}"
            )
    return OutputError(
        f"{reason}, and there is no room for the trained model ({size(needs)}) in {', '.join(tried) or 'any other'} "
        "folder either. Set TMPDIR to a folder on another disk before the run is started again."
    )


def _places() -> Iterator[Path]:
    """Folders that may be on another disk than the run's."""
    named = (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", os.environ.get("HOME"), os.getcwd(), "/dev/shm")
    for folder in dict.fromkeys(Path(name) for name in named if name):
        if folder.is_dir() and os.access(folder, os.W_OK):
            yield folder


def _copy_records(run: Path, place: Path) -> None:
    """What else makes a run: its recipe and its answers. They are small, and a run without them is whole."""
    with suppress(OSError):
        shutil.copyfile(run / "recipe.yaml", place / "recipe.yaml")
        shutil.copytree(run / "predictions", place / "predictions", dirs_exist_ok=True)
