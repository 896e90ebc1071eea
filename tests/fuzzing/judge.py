"""Judging one input: what a reader may do with it, under limits of time and memory.

Allowed are an error of weightport's, short and printable, or a result that equals what another reader makes of the
same bytes. Everything else is a finding: another exception, more processor time than a second for each megabyte, more
memory than the limit, a crash of the interpreter.
"""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing import cases
from fuzzing.cases import Case
from weightport.cli.display import LONGEST_ERROR, of_error
from weightport.errors import WeightportError

SECONDS_PER_MB = 1.0
MEMORY = 512 << 20
"""Bytes of address space that a worker may take beyond what it has when it starts."""

ACCEPTED, REFUSED, COMPARED, FINDING = "accepted", "refused", "compared", "finding"


class Overtime(BaseException):
    """The time for an input is over. No Exception, so that no reader takes it for one of its own."""


class MismatchError(Exception):
    """A reader accepted an input and made something else of it than the reader that it is compared with."""


@dataclass(frozen=True)
class Verdict:
    """`kind` is accepted, refused, compared (accepted and equal) or finding; of a finding, `key` is what tells it from
    others, and `detail` the traceback."""

    kind: str
    key: str = ""
    detail: str = ""


def limit_memory(extra: int = MEMORY) -> None:
    """Let this process take `extra` bytes of address space more than it has now."""
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class _Clock:
    """Processor time for one input. The timer ticks through the batch: setting it costs more than most inputs."""

    tick = 0.25

    def __init__(self) -> None:
        self.until: float | None = None
        self.ticks = False

    def _over(self, number: int, frame: Any) -> None:
        if self.until is not None and time.process_time() > self.until:
            self.until = None
            raise Overtime

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Raises Overtime when the block takes more than `seconds`, a quarter of a second later at the latest."""
        if not self.ticks:
            signal.signal(signal.SIGPROF, self._over)
            signal.setitimer(signal.ITIMER_PROF, self.tick, self.tick)
            self.ticks = True
        self.until = time.process_time() + seconds
        try:
            yield
        finally:
            self.until = None


_CLOCK = _Clock()


def judge(read: Callable[[Path], Any], compare: Callable[[Path, Any], bool], case: Case, folder: Path) -> Verdict:
    """What `read` makes of `case`, which stands in `folder`, and whether `compare` has nothing against it.

    `compare` returns whether there was another reader's result to compare with, and raises MismatchError.
    """
    seconds = SECONDS_PER_MB * max(1.0, cases.size(case) / 1e6)
    try:
        with _CLOCK.limited(seconds):
            found = read(folder)
    except WeightportError as error:
        return _judged_message(error)
    except MismatchError as mismatch:
        return _mismatch(mismatch)
    except Overtime:
        return _finding("overtime", f"more than {seconds:.0f} s", _where())
    except BaseException as error:
        return _finding(type(error).__name__, _raised_at(error), traceback.format_exc(limit=-12))
    try:
        return Verdict(COMPARED if compare(folder, found) else ACCEPTED)
    except MismatchError as mismatch:
        return _mismatch(mismatch)
    except Exception as error:
        return _finding(
            f"accepted, and the other reader raises {type(error).__name__}", "", traceback.format_exc(limit=-6)
        )


def _mismatch(mismatch: MismatchError) -> Verdict:
    return _finding("mismatch", str(mismatch).split(":")[0], str(mismatch))


def _judged_message(error: WeightportError) -> Verdict:
    """What the command line prints of it: text of a length that can be read."""
    text = of_error(str(error))
    if not text.strip() or len(text) > LONGEST_ERROR:
        return _finding("message of a wrong length", _raised_at(error), text[:1000])
    try:
        text.encode()
    except UnicodeEncodeError:
        return _finding("message not Unicode", _raised_at(error), ascii(text)[:1000])
    return Verdict(REFUSED)


def _finding(kind: str, place: str, detail: str) -> Verdict:
    return Verdict(FINDING, f"{kind} {place}", detail)


def _raised_at(error: BaseException) -> str:
    """The innermost of our functions that the error passed."""
    names = [
        f"{Path(frame.filename).name}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "/weightport/" in frame.filename
    ]
    return names[-1] if names else "elsewhere"


def _where() -> str:
    return traceback.format_exc(limit=-6)
