"""Killing a writer between any two calls of the system.

A child process runs the work with a hook on what Python asks of the file system (sys.addaudithook), and kills itself
with SIGKILL before the n-th such call; n counts up until the work ends by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from weightport.writing.ownership import RECORD

CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.scandir", "fcntl.flock")
LIMIT = 2000
"""More calls than any case makes."""


def killed_at_every_call(work: Callable[[], None], prepare: Callable[[], None], check: Callable[[], None]) -> int:
    """Run `work` in a child once for each of its calls, killed before it; `prepare` before and `check` after each.
    Returns the number of calls."""
    for number in range(1, LIMIT):
        prepare()
        child = os.fork()
        if child == 0:
            _run_killed(work, number)
        _, status = os.waitpid(child, 0)
        check()
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, f"the work failed by itself at call {number}"
            return number
    raise AssertionError("the work does not end")


def _run_killed(work: Callable[[], None], number: int) -> None:
    """In the child: never returns."""
    left = number

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in CALLS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        sys.addaudithook(count)
        work()
        status = 0
    finally:
        os._exit(status)


def fill(folder: Path, content: str) -> None:
    for name in ("config.json", "deep/weights"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def content_of(folder: Path) -> str:
    """Old or new; fails on a mixture, a part, or something more."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "deep/weights", RECORD}, files
    (found,) = {(folder / name).read_text() for name in ("config.json", "deep/weights")}
    return found
