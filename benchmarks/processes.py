"""Whole processes, timed in turn: what every benchmark here measures with, and the form that it hands figures on in.

Private memory is RssAnon of /proc: anonymous pages that are the process's own, its heap and buffers, without pages of
mapped files, which belong to the page cache and go when memory is short. USS, the unique set size, is what would be
free if the process ended: private pages of mapped files (touched code and data of libraries) with the anonymous ones.
Both are the peak of samples: private memory of one every 10 ms, USS of one every 100 ms, as reading it costs more.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_UNIQUE_EVERY = 10


@dataclass(frozen=True)
class Timing:
    """One whole process: wall time in seconds, peak private memory and peak USS in MB."""

    seconds: float
    megabytes: float
    unique: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Medians of one benchmark's rows, and which of them is ours, the peer, `cp` of what is written, and what
    starting costs alone. `unit`: what seconds are of, where that is not a whole process."""

    title: str
    ours: str
    peer: str
    rows: Mapping[str, Timing]
    copy: str = ""
    start: str = ""
    unit: str = ""

    @classmethod
    def of(cls, title: str, timings: Mapping[str, Sequence[Timing]], ours: str, peer: str, **more: str) -> Figures:
        """The medians of alternating runs."""
        return cls(title, ours, peer, {name: median(found) for name, found in timings.items() if found}, **more)


def median(found: Sequence[Timing]) -> Timing:
    """The medians of seconds and memory, each by itself."""
    return Timing(
        statistics.median(each.seconds for each in found),
        statistics.median(each.megabytes for each in found),
        statistics.median(each.unique for each in found),
    )


def save(path: Path | None, figures: Sequence[Figures]) -> None:
    """Write figures for bench.py to a file, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps([asdict(each) for each in figures]))


def load(path: Path) -> list[Figures]:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    return [Figures(**{**each, "rows": {name: Timing(**row) for name, row in each["rows"].items()}}) for each in found]


def alternate(
    commands: Mapping[str, list[str]], runs: int, clear: Callable[[], None] = lambda: None
) -> dict[str, list[Timing]]:
    """Run every command in turn, `runs` times; `clear` before each removes what the one before wrote."""
    timings: dict[str, list[Timing]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            clear()
            timings[name].append(timed(command))
    return timings


def timed(command: list[str], limit: int | None = None) -> Timing:
    """Run a command and sample its private memory every 10 ms. Raises CalledProcessError when it fails."""
    prepare: Callable[[], None] | None = None
    if limit is not None:
        prepare = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # noqa: E731
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=prepare)
    peak = unique = samples = 0
    while process.poll() is None:
        peak = max(peak, private_kilobytes(process.pid))
        if samples % _UNIQUE_EVERY == 0:
            unique = max(unique, unique_kilobytes(process.pid))
        samples += 1
        time.sleep(0.01)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Timing(time.perf_counter() - begun, peak / 1e3, unique / 1e3)


def private_kilobytes(pid: int) -> int:
    """RssAnon of a process, or 0 once it has gone."""
    return _sum(Path(f"/proc/{pid}/status"), ("RssAnon",))


def unique_kilobytes(pid: int) -> int:
    """USS of a process, or 0 once it has gone."""
    return _sum(Path(f"/proc/{pid}/smaps_rollup"), ("Private_Clean", "Private_Dirty"))


def _sum(path: Path, fields: tuple[str, ...]) -> int:
    try:
        text = path.read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(fields))
