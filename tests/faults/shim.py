"""The preloaded library that makes the n-th system call fail, and how a process arms it for itself."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
COUNT, SIGNAL, FAIL_ONCE, FAIL_FROM, SHORT, SHRINK, GROW, CHANGE = range(8)
READS, WRITES, REMOVES = 1, 2, 4


@dataclass(frozen=True)
class Fault:
    """What happens at the `nth` call below a folder, of those that `classes` counts: READS, WRITES, REMOVES or more.

    `kind` COUNT: nothing. SIGNAL: the signal `value`. FAIL_ONCE, FAIL_FROM: the error number `value`, at that call
    alone or at all from it on. SHORT: half of the bytes. SHRINK, GROW, CHANGE: so happens to the file `victim`.
    """

    kind: int = COUNT
    nth: int = 0
    value: int = 0
    classes: int = WRITES
    victim: str = ""


def compiler() -> str | None:
    """The C compiler of this machine, None where it has none."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def library() -> Path:
    """The library, compiled. Raises CalledProcessError where the compiler refuses it."""
    made = Path(tempfile.mkdtemp(prefix="faults-")) / "shim.so"
    subprocess.run([str(compiler()), "-O1", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl"], check=True)
    return made


def arm(fault: Fault, below: str) -> None:
    """In a process that was started with the library: count calls on what lies in `below` from now on."""
    entry = ctypes.CDLL(None).faults_arm
    entry.argtypes = (
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
    )
    victim = os.fsencode(fault.victim)
    entry(os.fsencode(below), fault.classes, fault.kind, fault.nth, fault.value, victim)


def counted() -> int:
    """How many calls there were since."""
    entry = ctypes.CDLL(None).faults_count
    entry.restype = ctypes.c_long
    return int(entry())


def disarm() -> None:
    ctypes.CDLL(None).faults_disarm()
