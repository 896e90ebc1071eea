"""A few faults of every kind on the quick commands, and that the harness finds what it looks for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faults.commands import COMMANDS, state_of
from faults.harness import EVERY, NONE, Bench, BrokenInvariantError, Tally, bench, spread
from faults.network import TEARS, HubServer, TornRelease, hub_environment, running
from faults.shim import FAIL_FROM, FAIL_ONCE, SHORT, SIGNAL, WRITES, Fault, compiler, library

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def made() -> Iterator[Bench]:
    with bench(every=False) as found:
        yield found


@pytest.mark.parametrize("existing", [False, True], ids=["over nothing", "over an output"])
@pytest.mark.parametrize("name", ["convert", "export"])
def test_a_fault_leaves_the_old_or_the_new_output_whole(made: Bench, name: str, existing: bool) -> None:
    command = COMMANDS[name]
    states = made.states(command, existing)
    every, writing = states[2:]
    faults = [(Fault(SIGNAL, nth, signal.SIGKILL, EVERY), "SIGKILL") for nth in spread(every, 4)]
    faults += [(Fault(SIGNAL, every // 2, number, EVERY), number.name) for number in (signal.SIGINT, signal.SIGTERM)]
    faults += [(Fault(FAIL_ONCE, nth, errno.ENOSPC, WRITES), "ENOSPC") for nth in spread(writing, 3)]
    faults += [(Fault(FAIL_FROM, writing // 2, errno.EIO, WRITES), "EIO"), (Fault(SHORT, 3, 0, WRITES), "short")]
    for fault, what in faults:
        made.tried(command, existing, fault, what, states)
    assert made.tally[name].broken == []
    assert {end.rpartition(": ")[2] for end in made.tally[name].ends} >= {"new", "old"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def shared(hub: HubServer) -> Iterator[Bench]:
    with bench(hub_environment(hub), every=False) as found:
        yield found


@pytest.fixture
def connected(shared: Bench) -> Bench:
    """With a tally of the test's own."""
    shared.tally["release"] = Tally()
    return shared


def test_a_network_that_tears_leaves_the_hub_with_a_whole_release(connected: Bench, hub: HubServer) -> None:
    torn = TornRelease(connected, hub, existing=False)
    commit = torn.requests
    for how in TEARS:
        torn.tried(how, commit)
        torn.tried(how, 3)
    tally = connected.tally["release"]
    assert tally.broken == []
    assert {end.rpartition(": ")[2] for end in tally.ends} == {"published", "published by the next run"}


def test_half_a_release_on_the_hub_is_a_broken_invariant(connected: Bench, hub: HubServer) -> None:
    torn = TornRelease(connected, hub, existing=False)
    torn.after = {**torn.after, "lost.bin": b""}
    torn.tried(TEARS[0], 1)
    (broken,) = connected.tally["release"].broken
    assert "neither the old release nor the new one" in broken


PROBE = """
import os, sys
from faults.shim import Fault, arm, counted
folder, fault = sys.argv[1], Fault(*map(int, sys.argv[2:6]))
arm(fault, folder)
try:
    handle = os.open(folder + "/a", os.O_CREAT | os.O_WRONLY)      # 1
    print(os.write(handle, b"12345678"))                           # 2
    os.fsync(handle)                                               # 3
    os.rename(folder + "/a", folder + "/b")                        # 4
    os.mkdir(folder + "/c")                                        # 5
except OSError as error:
    print(error.errno)
print(counted())
"""


def probed(folder: Path, *fault: int) -> Any:
    room = Path(__file__).resolve().parents[1]
    variables = {**os.environ, "LD_PRELOAD": str(library()), "PYTHONPATH": str(room)}
    command = [sys.executable, "-c", PROBE, str(folder), *map(str, fault)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "printed", "names"),
    [
        ((0, 0, 0, WRITES), "8 5", ["b", "c"]),
        ((FAIL_ONCE, 1, errno.EDQUOT, WRITES), "122 1", []),
        ((FAIL_ONCE, 4, errno.EIO, WRITES), "8 5 4", ["a"]),
        ((FAIL_FROM, 3, errno.ENOSPC, WRITES), "8 28 3", ["a"]),
        ((SHORT, 2, 0, WRITES), "4 5", ["b", "c"]),
    ],
)
def test_the_shim_fails_the_call_it_was_told_to(
    tmp_path: Path, fault: tuple[int, ...], printed: str, names: list[str]
):
    assert probed(tmp_path, *fault).stdout.split() == printed.split()
    assert sorted(os.listdir(tmp_path)) == names


def test_the_shim_kills_before_the_call_is_made(tmp_path: Path) -> None:
    assert probed(tmp_path, SIGNAL, 4, signal.SIGKILL, WRITES).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("fault", "status", "output", "said"),
    [
        (NONE, 1, "weightport: one\nweightport: two", "2 messages"),
        (NONE, 1, "nothing", "0 messages"),
        (NONE, 1, "Traceback (most recent call last):", "no error of ours"),
        (NONE, 3, "weightport: x", "exit status 3"),
        (NONE, 999, "", "hangs"),
        (Fault(SIGNAL, 1, signal.SIGTERM), 130, "weightport: x", "exit status 130"),
        (Fault(SIGNAL, 1, signal.SIGKILL), 1, "weightport: x", "exit status 1"),
    ],
)
def test_an_end_that_must_not_be_is_a_broken_invariant(fault: Fault, status: int, output: str, said: str) -> None:
    with pytest.raises(BrokenInvariantError, match=said):
        Bench._judged_end(fault, status, output)


def judged(room: Path, states: tuple[str | None, str | None]) -> str:
    stand_in = SimpleNamespace(
        outputs=room,
        out=lambda command: room / "out",
        _next_run=lambda command: None,
        _judged_inputs=lambda fault: None,
        _judged_end=Bench._judged_end,
    )
    killed = {"status": -9, "output": ""}
    return Bench._judged(stand_in, COMMANDS["convert"], True, Fault(SIGNAL, 1, 9), killed, states)  # type: ignore[arg-type]


def test_a_mixture_and_what_is_left_behind_are_broken_invariants(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    old = state_of(tmp_path / "out")
    assert judged(tmp_path, (old, "new")) == "old"
    (tmp_path / ".out.weightport-1").touch()
    with pytest.raises(BrokenInvariantError, match=r"left behind: \.out"):
        judged(tmp_path, (old, "new"))
    (tmp_path / "out" / "b").write_text("half")
    with pytest.raises(BrokenInvariantError, match="neither old nor new"):
        judged(tmp_path, (old, "new"))
