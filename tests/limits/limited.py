"""Commands in processes of little memory, and what they took."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
LIMIT = 2 * GIB
"""Bytes of private writable memory that a command may have (RLIMIT_DATA)."""

DISK = float(os.environ.get("WEIGHTPORT_LIMITS_GB", "4")) * 1e9
"""Bytes that what is written may take on the disk."""


@dataclass(frozen=True)
class Done:
    """A finished command: exit status, what it printed, wall and processor seconds, peak of private bytes."""

    status: int
    output: str
    seconds: float
    processor: float
    private: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s wall, {self.processor:.1f} s processor, {self.private / 1e6:.0f} MB private"


def weightport(*arguments: object, limit: int = LIMIT) -> Done:
    """`weightport ARGUMENTS`, limited."""
    return python("from weightport.cli import main; main()", *arguments, limit=limit)


def python(program: str, *arguments: object, limit: int = LIMIT) -> Done:
    """A program, its memory limited."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        private = 0
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            private = max(private, _private(process.pid))
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begun
        output.seek(0)
        return Done(process.returncode, output.read(), seconds, used.ru_utime + used.ru_stime, private)


def _private(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
