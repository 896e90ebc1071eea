"""Running a command under one fault after another, and the invariants that hold after each.

- The output is the old one or the new one, whole, or nothing where nothing was.
- The inputs are what they were.
- After the next run nothing is left beside the output.
- A failure has exit status 1 (a signal its own) and one message, and is no defect by its own words.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.commands import COMMANDS, Command, copied, files_of, make_inputs, state_of
from faults.shim import (
    CHANGE,
    COUNT,
    FAIL_FROM,
    FAIL_ONCE,
    GROW,
    READS,
    REMOVES,
    SHORT,
    SHRINK,
    SIGNAL,
    WRITES,
    Fault,
    library,
)

EVERY = READS | WRITES | REMOVES
TESTS = Path(__file__).resolve().parents[1]
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
CHANGES = {"shrinks": SHRINK, "grows": GROW, "changes": CHANGE}
NOBODY = 65534
NONE = Fault()
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}


class BrokenInvariantError(AssertionError):
    """After a fault something is not as it must be."""


@dataclass
class Tally:
    """Runs by what was tried, and how they ended; `broken` says which invariant failed where."""

    runs: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


class Bench:
    """Inputs, a server that runs commands, and a room where they run. `existing` outputs are kept to be copied."""

    def __init__(self, room: Path, environment: dict[str, str] | None = None, *, every: bool = True) -> None:
        self.room = room
        make_inputs(room, every=every)
        self.inputs = state_of(room / "inputs")
        self.outputs = room / "outputs"
        self.kept = room / "kept"
        self.kept.mkdir(exist_ok=True)
        self.tally: dict[str, Tally] = {name: Tally() for name in COMMANDS}
        self.files: dict[tuple[str, bool], tuple[dict[str, str], dict[str, str]]] = {}
        self.server = self._start(environment or {})

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        home = self.room / "home"
        home.mkdir(exist_ok=True)
        variables = {
            **os.environ,
            "LD_PRELOAD": str(library()),
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        server = subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        assert server.stdout is not None and json.loads(server.stdout.readline())["ready"]
        return server

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.kill()
        self.server.wait()

    def run(self, argv: Sequence[str], fault: Fault = NONE, below: Path | None = None, user: int = 0) -> Any:
        """What came of `weightport argv…` under `fault`; `user`: the number of the user that it runs as."""
        (answer,) = self.run_at_once([argv], fault, below, user)
        return answer

    def run_at_once(
        self, commands: Sequence[Sequence[str]], fault: Fault = NONE, below: Path | None = None, user: int = 0
    ) -> list[Any]:
        requests = [
            {
                "argv": list(argv),
                "fault": vars(fault),
                "below": str(below or self.room),
                "user": user,
                "cwd": str(self.room / "home"),
            }
            for argv in commands
        ]
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(requests) + "\n")
        self.server.stdin.flush()
        answers: list[Any] = json.loads(self.server.stdout.readline())
        return answers

    def out(self, command: Command) -> Path:
        return self.outputs / ("out.bin" if command.is_file else "out")

    def prepared(self, command: Command, existing: bool) -> None:
        """An outputs folder with the earlier result or none; a release is of a model that stands there."""
        earlier = self._existing(command) if existing else None
        shutil.rmtree(self.outputs, ignore_errors=True)
        self.outputs.mkdir()
        if command.name == "release":
            copied(self.room / "inputs" / "model", self.out(command))
        if earlier is not None:
            shutil.rmtree(self.out(command), ignore_errors=True)
            copied(earlier, self.out(command))

    def _existing(self, command: Command) -> Path:
        place = self.kept / command.name
        if not place.exists():
            self.prepared(command, False)
            done = self.run(command.other(self.room, self.out(command)))
            if done["status"]:
                raise RuntimeError(f"{command.name} fails by itself: {done['output']}")
            copied(self.out(command), place)
        return place

    def argv(self, command: Command, existing: bool) -> list[str]:
        argv = list(command.argv(self.room, self.out(command)))
        return [*argv, "--overwrite"] if existing and command.name != "release" else argv

    def states(self, command: Command, existing: bool) -> tuple[str | None, str | None, int, int]:
        """(old state, new state, calls of every kind, writing calls) of a run without a fault."""
        self.prepared(command, existing)
        old = state_of(self.out(command), command.varies)
        files = files_of(self.out(command))
        done = self.run(self.argv(command, existing), Fault(COUNT, classes=EVERY))
        if done["status"] or done["calls"] is None:
            raise RuntimeError(f"{command.name} fails by itself: {done['output']}")
        new = state_of(self.out(command), command.varies)
        self.files[command.name, existing] = (files, files_of(self.out(command)))
        every = done["calls"]
        self.prepared(command, existing)
        writing = self.run(self.argv(command, existing), Fault(COUNT, classes=WRITES))["calls"]
        return old, new, every, writing

    def tried(self, command: Command, existing: bool, fault: Fault, what: str, states: Sequence[Any]) -> None:
        """One run under a fault, and the invariants."""
        tally = self.tally[command.name]
        self.prepared(command, existing)
        below = self.outputs if fault.kind in (FAIL_ONCE, FAIL_FROM, SHORT) else self.room
        done = self.run(self.argv(command, existing), fault, below)
        tally.runs[what] += 1
        try:
            end = self._judged(command, existing, fault, done, states)
            tally.ends[f"{what}: {end}"] += 1
        except BrokenInvariantError as error:
            place = f"{command.name} over {'an output' if existing else 'nothing'}, {what} at call {fault.nth}"
            tally.broken.append(f"{place}: {error}")

    def changed_source(self, command: Command, kind: int, nth: int, what: str, states: Sequence[Any]) -> None:
        """A run whose source changes at its `nth` reading: the result is of one version of it, or there is none."""
        tally, source = self.tally[command.name], self.room / command.source
        self.prepared(command, True)
        before = source.with_name(f"{source.name}.before")
        shutil.copy2(source, before)
        done = self.run(self.argv(command, True), Fault(kind, nth, 0, READS, str(source)), self.room / command.source)
        tally.runs[what] += 1
        try:
            self._judged_end(Fault(kind), done["status"], done["output"])
            self._next_run(command)
            found = state_of(self.out(command), command.varies)
            if done["status"]:
                if found != states[0]:
                    raise BrokenInvariantError("a failure, and the old output is gone")
            elif found != states[1]:
                # Changed before it was opened: then it is the changed file's, as a run of today makes it.
                self.prepared(command, True)
                again = self.run(self.argv(command, True))
                if again["status"] or state_of(self.out(command), command.varies) != found:
                    raise BrokenInvariantError("the result is of no one version of the source")
            tally.ends[f"{what}: {'refused' if done['status'] else 'one version'}"] += 1
        except BrokenInvariantError as error:
            tally.broken.append(f"{command.name}, {what} at reading {nth}: {error}")
        finally:
            os.replace(before, source)

    def two_writers(self, command: Command, states: Sequence[Any]) -> None:
        """Two runs at once to one output: one of the two results stands there, whole, and who failed says why."""
        tally = self.tally[command.name]
        self.prepared(command, True)
        argvs = [self.argv(command, True), [*command.other(self.room, self.out(command)), "--overwrite"]]
        done = self.run_at_once(argvs)
        tally.runs["two writers"] += 1
        try:
            for each in done:
                self._judged_end(Fault(), each["status"], each["output"])
            self._next_run(command)
            if state_of(self.out(command), command.varies) not in states[:2]:
                raise BrokenInvariantError(f"a mixture: {_names(self.out(command))}")
            if left := [name for name in os.listdir(self.outputs) if name != self.out(command).name]:
                raise BrokenInvariantError(f"left behind: {', '.join(left)}")
            tally.ends[f"two writers: {sorted(each['status'] for each in done)}"] += 1
        except BrokenInvariantError as error:
            tally.broken.append(f"{command.name}, two writers: {error}")

    def read_only(self, command: Command, existing: bool) -> None:
        """An ordinary user, whose home and outputs folder are not writable: one error, and nothing changes."""
        tally = self.tally[command.name]
        self.prepared(command, existing)
        before = state_of(self.out(command))
        for place in (self.room, self.room / "inputs", self.outputs):
            place.chmod(0o555)
        try:
            done = self.run(self.argv(command, existing), user=NOBODY)
            tally.runs["read-only folder"] += 1
            self._judged_end(Fault(), done["status"], done["output"])
            if done["status"] != 1 or state_of(self.out(command)) != before:
                raise BrokenInvariantError(f"exit status {done['status']}: {done['output'][-500:]}")
            tally.ends["read-only folder: refused"] += 1
        except BrokenInvariantError as error:
            tally.broken.append(f"{command.name}, read-only folder: {error}")
        finally:
            for place in (self.room, self.room / "inputs", self.outputs):
                place.chmod(0o755)

    def _judged(self, command: Command, existing: bool, fault: Fault, done: Any, states: Sequence[Any]) -> str:
        old, new = states[:2]
        status, output = done["status"], done["output"]
        self._judged_end(fault, status, output)
        self._next_run(command)
        found = state_of(self.out(command), command.varies)
        allowed = {old, new} if status else {new}
        if command.name == "release" and status and found not in allowed:
            self._judged_release(command, existing)
        elif command.in_place and found not in allowed:
            self._judged_part(command, existing, status)
        elif found not in allowed:
            raise BrokenInvariantError(f"the output is neither old nor new: {_names(self.out(command))}")
        left = sorted(name for name in os.listdir(self.outputs) if name != self.out(command).name)
        if left:
            raise BrokenInvariantError(f"left behind: {', '.join(left)}")
        self._judged_inputs(fault)
        if status == 0:
            return "new"
        return "old" if found == old else "new, and a failure" if found == new else "a part of a run"

    @staticmethod
    def _judged_end(fault: Fault, status: int, output: str) -> None:
        if status == 999:
            raise BrokenInvariantError(f"hangs: {output[-500:]}")
        if "Traceback" in output or "This is a defect" in output:
            raise BrokenInvariantError(f"no error of ours: {output[-1500:]}")
        if fault.kind == SIGNAL and "a process that reads the data was ended" in output:
            # The signal came to a worker of the data loader: the command ends with an error that says so.
            wanted = {1}
        elif fault.kind == SIGNAL and fault.value == signal.SIGKILL:
            wanted = {0, -signal.SIGKILL}
        elif fault.kind == SIGNAL:
            wanted = {0, INTERRUPTED[signal.Signals(fault.value)]}
        else:
            wanted = {0, 1}
        if status not in wanted:
            raise BrokenInvariantError(f"exit status {status}: {output[-1500:]}")
        if status > 0 and output.count("weightport: ") != 1:
            raise BrokenInvariantError(f"{output.count('weightport: ')} messages: {output[-1500:]}")

    def _next_run(self, command: Command) -> None:
        """What the next run that writes to the folder does: a release writes into the model's own."""
        from weightport.writing import whole_file

        folder = self.out(command) if command.name == "release" else self.outputs
        with whole_file(folder / "next.pt") as work:
            work.write_text("x")
        (folder / "next.pt").unlink()

    def _judged_part(self, command: Command, existing: bool, status: int) -> None:
        """A run's folder that is filled in place: over an earlier run only when it has a checkpoint of its own. A run
        that ended well has its model, whether or not each checkpoint could be written."""
        found = self.out(command)
        model = (found / "model" / "model.safetensors").exists()
        if not model and (not status or (existing and not any(found.glob("checkpoints/checkpoint-*")))):
            raise BrokenInvariantError(f"the earlier run is gone, and there is no checkpoint: {_names(found)}")

    def _judged_release(self, command: Command, existing: bool) -> None:
        """A release that was ended between its files (the card, the hashes): each is the old one or the new one."""
        old, new = self.files[command.name, existing]
        found = files_of(self.out(command))
        allowed = {name: {old.get(name), new.get(name)} for name in old.keys() | new.keys()}
        if any(found.get(name) not in states for name, states in allowed.items()) or found.keys() - allowed.keys():
            raise BrokenInvariantError(f"a file is neither old nor new: {_names(self.out(command))}")

    def _judged_inputs(self, fault: Fault) -> None:
        if fault.kind in (SHRINK, GROW, CHANGE):
            return
        if state_of(self.room / "inputs") != self.inputs:
            raise BrokenInvariantError("an input was changed")


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.is_dir() else []


def spread(count: int, points: int) -> list[int]:
    """At most `points` of the calls 1 to `count`, evenly: the first and the last among them."""
    if count <= points:
        return list(range(1, count + 1))
    return sorted({1 + round(place * (count - 1) / (points - 1)) for place in range(points)})


def series(states: Sequence[Any], points: int) -> Iterator[tuple[Fault, str]]:
    """The faults of a command by the calls that it makes: kills, interruptions, every error, short writes."""
    every, writing = states[2], states[3]
    for nth in spread(every, points):
        yield Fault(SIGNAL, nth, signal.SIGKILL, EVERY), "SIGKILL"
    few, some = max(points // 12, 3), max(points // 3, 3)
    for number in (signal.SIGINT, signal.SIGTERM):
        for nth in spread(every, few):
            yield Fault(SIGNAL, nth, number, EVERY), number.name
    for name, code in ERRORS.items():
        for nth in spread(writing, some if name == "ENOSPC" else few):
            yield Fault(FAIL_ONCE, nth, code, WRITES), name
        for nth in spread(writing, few):
            yield Fault(FAIL_FROM, nth, code, WRITES), f"{name} from there on"
    for nth in spread(writing, some):
        yield Fault(SHORT, nth, 0, WRITES), "short write"


@contextmanager
def bench(environment: dict[str, str] | None = None, *, every: bool = True) -> Iterator[Bench]:
    """A bench in a folder of memory, where syncing costs nothing. `every`: with the inputs of all commands."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=folder) as room:
        made = Bench(Path(room), environment, every=every)
        try:
            yield made
        finally:
            made.close()
