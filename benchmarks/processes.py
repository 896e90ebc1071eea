"""Whole processes, timed: what every benchmark here measures with."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """One whole process: wall time in seconds, peak private memory in MB."""

    seconds: float
    megabytes: float


def timed(command: list[str], limit: int | None = None) -> Timing:
    """Run a command and sample its private memory every 10 ms. Raises CalledProcessError when it fails."""
    prepare: Callable[[], None] | None = None
    if limit is not None:
        prepare = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # noqa: E731
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=prepare)
    peak = 0
    while process.poll() is None:
        peak = max(peak, private_kilobytes(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Timing(time.perf_counter() - begun, peak / 1e3)


def private_kilobytes(pid: int) -> int:
    """RssAnon of a process, or 0 once it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
