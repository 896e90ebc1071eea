"""`make faults`: every command under every fault, and the invariants after each run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.commands import COMMANDS
from faults.harness import CHANGES, Bench, bench, series, spread
from faults.network import HubServer, TornRelease, hub_environment, running
from faults.shim import COUNT, READS, Fault, compiler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", action="append", choices=list(COMMANDS), help="only this one; may be repeated")
    parser.add_argument("--points", type=int, default=100, help="kills of a command over one state of its output")
    parser.add_argument("--state", type=Path, help="a JSON file for the figures, written as they come")
    arguments = parser.parse_args()
    if compiler() is None:
        print("faults need a C compiler (cc, gcc or clang)", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        hub = stack.enter_context(running())
        made = stack.enter_context(bench(hub_environment(hub)))
        for name in arguments.command or COMMANDS:
            started = time.monotonic()
            attack(made, name, arguments.points, arguments.state)
            if name == "release":
                tear(made, hub)
            _print(made, name, time.monotonic() - started)
    return 1 if any(tally.broken for tally in made.tally.values()) else 0


def tear(made: Bench, hub: HubServer) -> None:
    """A release whose network tears, at each of its requests."""
    for existing in (False, True):
        torn = TornRelease(made, hub, existing)
        for how, nth in torn.series():
            torn.tried(how, nth)


def attack(made: Bench, name: str, points: int, state: Path | None = None) -> None:
    """Everything that is tried on one command; the figures so far go to `state` now and then."""
    command = COMMANDS[name]
    for existing in (False, True):
        states = made.states(command, existing)
        for fault, what in series(states, points):
            made.tried(command, existing, fault, what, states)
            if state and fault.nth % 20 == 0:
                _save(made, state)
    if os.getuid() == 0 and name != "release":
        for existing in (False, True):
            made.read_only(command, existing)
    if state:
        _save(made, state)
    if name in ("finetune", "release"):
        return
    for _ in range(max(points // 20, 1)):
        made.two_writers(command, states)
    made.prepared(command, True)
    readings = made.run(made.argv(command, True), Fault(COUNT, classes=READS), made.room / command.source)["calls"]
    for what, kind in CHANGES.items():
        for nth in spread(readings or 0, max(points // 10, 3)):
            made.changed_source(command, kind, nth, f"source {what}", states)
    if state:
        _save(made, state)


def _save(made: Bench, state: Path) -> None:
    figures = {name: vars(tally) for name, tally in made.tally.items()}
    state.write_text(json.dumps(figures, indent=1))


def _print(made: Bench, name: str, seconds: float) -> None:
    tally = made.tally[name]
    print(f"{name}: {sum(tally.runs.values())} runs in {seconds:.0f} s, {len(tally.broken)} broken invariants")
    for what, count in sorted(tally.runs.items()):
        ends = ", ".join(
            f"{each.partition(': ')[2]} {number}"
            for each, number in sorted(tally.ends.items())
            if each.startswith(f"{what}: ")
        )
        print(f"  {what:24} {count:5}   {ends}")
    for broken in tally.broken[:20]:
        print(f"  BROKEN {broken}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
