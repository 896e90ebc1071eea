"""A fuzzing campaign: batches of inputs in worker processes, led by the lines of code that inputs reach.

A worker is forked for each batch, so that imports are paid once and a crash, a hang in C or memory that is used up
ends the batch and no more. What it was at stands in its folder, where the campaign finds it.
"""

from __future__ import annotations

import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

from fuzzing import cases
from fuzzing.cases import Case
from fuzzing.judge import ACCEPTED, COMPARED, FINDING, REFUSED, Verdict, judge, limit_memory

TRACED, LATER_TRACED = 4, 25
"""One input in so many is traced, at the beginning and once most lines are known; it is several times slower."""
BEGINNING = 4000
CORPUS = 400
LONGEST_SILENCE = 60.0
"""Seconds after which a worker that reports nothing is ended: it hangs where no signal of Python's reaches it."""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    `seeds` gives well-formed cases, `change` a case from one of them, `read` the reader (which reads whatever it
    opened), `compare` holds what it gave against another reader, `modules` are the folders and files below
    weightport/ whose lines lead.
    """

    name: str
    seeds: Callable[[Path], list[Case]]
    change: Callable[[Random, Case, list[Case]], Case]
    read: Callable[[Path], Any]
    compare: Callable[[Path, Any], bool] = lambda folder, found: False
    modules: tuple[str, ...] = ("checkpoints/",)


@dataclass
class Result:
    """Counts of a target's inputs by verdict, its findings by what tells them apart, processor time."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    seconds: float = 0.0
    findings: dict[str, tuple[dict[str, bytes], str]] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)

    @property
    def inputs(self) -> int:
        return sum(self.counts[kind] for kind in (ACCEPTED, COMPARED, REFUSED, FINDING))


class Coverage:
    """The lines of some modules that were reached, in (code, line) pairs."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.parts = tuple(f"/weightport/{module}" for module in modules)
        self.known: dict[CodeType, bool] = {}
        self.seen: set[tuple[str, int]] = set()
        self.fresh = False

    def __enter__(self) -> Coverage:
        self.fresh = False
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        inside = self.known.get(code)
        if inside is None:
            inside = self.known[code] = any(part in code.co_filename for part in self.parts)
        return self._line if inside else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        at = (frame.f_code.co_filename, frame.f_lineno if event != "exception" else -frame.f_lineno)
        if at not in self.seen:
            self.seen.add(at)
            self.fresh = True
        return self._line


class Campaign:
    """The inputs of one target: `batch` after `batch`, each of a seed of its own."""

    def __init__(self, target: Target, seed: int, folder: Path | None = None) -> None:
        self.target = target
        self.seed = seed
        self.room = Path(tempfile.mkdtemp(prefix=f"fuzz-{target.name}-", dir=folder or _fast_folder()))
        self.seeds = target.seeds(self.room / "seeds")
        self.corpus: list[Case] = list(self.seeds)
        self.reached: set[tuple[str, int]] = set()
        self.result = Result()
        self.batches = 0
        (self.room / "case").mkdir()

    def close(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)

    def batch(self, count: int) -> None:
        """Judge `count` more inputs."""
        done = 0
        while done < count:
            done += self._forked(count - done)

    def _forked(self, count: int) -> int:
        """At most `count` inputs in a worker; returns how many were judged."""
        rng = Random(f"{self.seed} {self.target.name} {self.batches}")
        self.batches += 1
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            self._work(rng, count, write_end)
        os.close(write_end)
        done, ended = 0, False
        for kind, content in _messages(read_end, child):
            if kind == "verdict":
                done += 1
                self._count(*content)
            elif kind == "corpus":
                self._keep(content)
            elif kind == "end":
                self.reached |= content
                ended = True
        os.close(read_end)
        _, status, used = os.wait4(child, 0)
        self.result.seconds += used.ru_utime + used.ru_stime
        if not ended:
            done += 1
            code = os.waitstatus_to_exitcode(status)
            how = f"hang ({LONGEST_SILENCE:.0f} s)" if code == -signal.SIGKILL else f"ended the process: {code}"
            self._count(Verdict(FINDING, how, how), cases.read(self.room / "case"))
        self.result.lines = len(self.reached)
        return done

    def _count(self, verdict: Verdict, case: dict[str, bytes] | None = None) -> None:
        self.result.counts[verdict.kind] += 1
        if verdict.kind == FINDING and case is not None:
            self.result.times[verdict.key] += 1
            earlier = self.result.findings.get(verdict.key)
            if earlier is None or cases.size(case) < cases.size(earlier[0]):
                self.result.findings[verdict.key] = (case, verdict.detail)

    def _keep(self, case: Case) -> None:
        self.corpus.append(case)
        if len(self.corpus) > CORPUS:
            del self.corpus[len(self.seeds)]

    def _work(self, rng: Random, count: int, handle: int) -> None:
        """In the worker: never returns."""
        status = 1
        try:
            quiet_libraries()
            limit_memory()
            with os.fdopen(handle, "wb") as pipe:
                self._judge_all(rng, count, pipe)
            status = 0
        except BaseException as error:
            os.write(2, f"fuzzing {self.target.name}: {error!r}\n".encode())
        finally:
            os._exit(status)

    def _judge_all(self, rng: Random, count: int, pipe: Any) -> None:
        coverage = Coverage(self.target.modules)
        coverage.seen |= self.reached
        corpus, place = list(self.corpus), self.room / "case"
        every = TRACED if self.result.inputs < BEGINNING else LATER_TRACED
        for number in range(count):
            case = self.target.change(rng, rng.choice(corpus if rng.random() < 0.7 else self.seeds), corpus)
            cases.write(case, place)
            if number % every == 0:
                with coverage:
                    verdict = judge(self.target.read, self._unjudged, case, place)
                if coverage.fresh and verdict.kind != FINDING:
                    corpus.append(case)
                    _send(pipe, "corpus", dict(case))
            verdict = judge(self.target.read, self.target.compare, case, place)
            _send(pipe, "verdict", (verdict, dict(case)) if verdict.kind == FINDING else (verdict,))
            pipe.flush()
        _send(pipe, "end", coverage.seen)

    @staticmethod
    def _unjudged(folder: Path, found: Any) -> bool:
        return False


def judged_in_worker(target: Target, case: Case, seconds: float = 60.0) -> Verdict:
    """The verdict on one case, in a process of its own."""
    room = Path(tempfile.mkdtemp(prefix="fuzz-one-", dir=_fast_folder()))
    try:
        cases.write(case, room / "case")
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                quiet_libraries()
                limit_memory()
                with os.fdopen(write_end, "wb") as pipe:
                    pickle.dump(judge(target.read, target.compare, case, room / "case"), pipe)
            finally:
                os._exit(0)
        os.close(write_end)
        ready, _, _ = select.select([read_end], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(read_end, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        found: Verdict = pickle.loads(answer) if answer else Verdict(FINDING, "ended the process" if ready else "hang")
        return found
    finally:
        shutil.rmtree(room, ignore_errors=True)


def minimised(target: Target, case: Case, key: str, seconds: float = 20.0) -> dict[str, bytes]:
    """A smaller case with the same finding: parts of its files left out, and files, while time allows."""
    best, until = dict(case), time.monotonic() + seconds

    def same(candidate: Case) -> bool:
        return judged_in_worker(target, candidate, 10).key == key

    for name in sorted(best):
        without = {other: data for other, data in best.items() if other != name}
        if without and time.monotonic() < until and same(without):
            best = without
    for name in sorted(best):
        length = max(len(best[name]) // 2, 1)
        while length and time.monotonic() < until:
            at, shorter = 0, False
            while at < len(best[name]) and time.monotonic() < until:
                data = best[name][:at] + best[name][at + length :]
                if same({**best, name: data}):
                    best[name], shorter = data, True
                else:
                    at += length
            if not shorter:
                length //= 2
    return best


def quiet_libraries() -> None:
    """What other readers say of a broken input is no news."""
    import faulthandler
    import logging
    import warnings

    faulthandler.disable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _send(pipe: Any, kind: str, content: Any) -> None:
    message = pickle.dumps((kind, content))
    pipe.write(len(message).to_bytes(8, "little") + message)


def _messages(handle: int, child: int) -> Iterator[tuple[str, Any]]:
    """What the worker sends, until it ends; a worker that is silent too long is killed."""
    buffer = bytearray()
    while True:
        ready, _, _ = select.select([handle], [], [], LONGEST_SILENCE)
        if not ready:
            os.kill(child, signal.SIGKILL)
            return
        part = os.read(handle, 1 << 16)
        if not part:
            return
        buffer += part
        at = 0
        while at + 8 <= len(buffer):
            end = at + 8 + int.from_bytes(buffer[at : at + 8], "little")
            if end > len(buffer):
                break
            yield pickle.loads(buffer[at + 8 : end])
            at = end
        del buffer[:at]
