"""What commands show: one line a step, and progress with rates and remaining time."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightport.formatting import size

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL = 5.0
"""Seconds between progress lines when standard output is not a terminal."""

PIPED = 200
"""Columns of a table where neither a terminal nor COLUMNS says how many there are."""


def output_console() -> Console:
    """Standard output for tables: as wide as the terminal or COLUMNS says, `PIPED` columns without either."""
    from rich.console import Console

    console = Console()
    stated = os.environ.get("COLUMNS", "")
    return console if console.is_terminal or stated.isdecimal() else Console(width=PIPED)


def names_in(folder: Path) -> str:
    """The names of an output's files on one line; not weightport's own record of them."""
    return " · ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))


# C0 without tab and line feed, C1, and what turns the direction of writing: a terminal obeys these. Halves of
# surrogate pairs, as names of files that are not UTF-8 have them, cannot be printed at all.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def inert(text: str) -> str:
    """`text` with every character that a terminal would obey instead of showing as its escape: ESC is \\u001b.

    Inside of JSON, where only its strings can hold such characters, that is still the same JSON.
    """
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


LONGEST_ERROR = 4000


def of_error(message: str) -> str:
    """An error's message as it is printed: inert, and without its middle where it quotes a file at length. What was
    expected stands at a message's beginning, and what to do at its end."""
    text = inert(message)
    if len(text) <= LONGEST_ERROR:
        return text
    return f"{text[: LONGEST_ERROR - 1000]} […] {text[-900:]}"


def echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """Print text that may come from a file: every command prints through here."""
    click.echo(inert(text), nl=nl, err=err)


class Lines:
    """Prints `label   text` lines, or nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def line(self, label: str, text: str) -> None:
        """One line, the label in a column of its own."""
        if not self._quiet:
            echo(f"{label:<8} {text}")

    def heading(self, text: str) -> None:
        """A line without a label."""
        if not self._quiet:
            echo(text)

    @contextmanager
    def progress(
        self, label: str, shown: Callable[[float], str] = size
    ) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
        """(`start(total)`, `advance(amount)`): a bar on a terminal, a line now and then elsewhere.

        `shown` puts an amount into words, bytes by default.
        """
        if self._quiet:
            yield (lambda total: None), (lambda amount: None)
        elif sys.stdout.isatty():
            with _bar(label, shown) as functions:
                yield functions
        else:
            yield _plain(label, shown)


@contextmanager
def _bar(label: str, shown: Callable[[float], str]) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amounts(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = f"/{shown(task.total)}" if task.total else ""
            rate = f" · {shown(task.speed)}/s" if task.speed else ""
            return Text(f"{shown(task.completed)}{total}{rate}")

    with Progress(TextColumn(f"{label:<8}"), BarColumn(bar_width=24), Amounts(), TimeRemainingColumn()) as progress:
        task = progress.add_task(label, total=None)
        yield (lambda total: progress.update(task, total=total)), (lambda amount: progress.advance(task, amount))


def _plain(label: str, shown: Callable[[float], str]) -> tuple[Callable[[int], None], Callable[[int], None]]:
    state = {"total": 0, "done": 0}
    begun = last = time.monotonic()

    def start(total: int) -> None:
        # The rate is that of the work, not of what came before it.
        nonlocal begun, last
        state["total"] = total
        begun = last = time.monotonic()

    def advance(amount: int) -> None:
        nonlocal last
        state["done"] += amount
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            rate = state["done"] / (now - begun)
            left = (state["total"] - state["done"]) / rate if rate else 0.0
            done, total = shown(state["done"]), shown(state["total"])
            echo(f"{label:<8} {done} of {total} · {shown(rate)}/s · {left:.0f} s left")

    return start, advance
