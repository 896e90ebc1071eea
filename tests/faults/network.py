"""A release whose network tears at its n-th request, and what must hold of the directory and of the Hub after it.

- The Hub holds the release that it held, or the new one whole: the commit is the only thing that changes it.
- The directory is as after every other fault: each file old or new.
- There is one message, and running the same command again publishes; weights that arrived are not sent again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_server import DROP, STALL, TEAR, TOKEN, HubServer, running

from faults.commands import COMMANDS, REPO
from faults.harness import NONE, Bench, BrokenInvariantError
from faults.shim import SIGNAL, Fault

__all__ = ["TEARS", "HubServer", "Tear", "TornRelease", "hub_environment", "running"]

RELEASE = COMMANDS["release"]
KILLED = Fault(SIGNAL, value=signal.SIGKILL)


def hub_environment(hub: HubServer) -> dict[str, str]:
    """What makes a command take `hub` for the Hub: nothing asks the network."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@dataclass(frozen=True)
class Tear:
    """What happens to the n-th request, or to it and all after it; `killed`: the command ends there by SIGKILL."""

    name: str
    fault: Any
    from_there_on: bool = False
    killed: bool = False

    @property
    def what(self) -> str:
        return f"network, {self.name}" + (" from there on" if self.from_there_on else "")

    def planted(self, nth: int, kill: Callable[[], None]) -> Callable[[int], Any]:
        def fault(number: int) -> Any:
            if number != nth and not (self.from_there_on and number > nth):
                return None
            if self.killed:
                kill()
            return self.fault

        return fault


TEARS = (
    Tear("connection reset", DROP),
    Tear("connection reset", DROP, from_there_on=True),
    Tear("answer torn", TEAR),
    Tear("answer torn", TEAR, from_there_on=True),
    Tear("503", (503, "busy")),
    Tear("503", (503, "busy"), from_there_on=True),
    Tear("401", (401, "who are you"), from_there_on=True),
    Tear("no answer", STALL),
    Tear("SIGKILL at the request", DROP, killed=True),
)


@dataclass(frozen=True)
class Stored:
    """What the Hub holds: each repository, its committed files, and the objects that arrived."""

    repositories: Mapping[str, dict[str, Any]]
    files: Mapping[tuple[str, str], Mapping[str, bytes]]
    objects: Mapping[str, bytes]

    @classmethod
    def of(cls, hub: HubServer) -> Stored:
        files = {place: dict(found) for place, found in hub.files.items()}
        return cls(dict(hub.repositories), files, dict(hub.objects))

    def put_into(self, hub: HubServer) -> None:
        for held, found in ((hub.repositories, self.repositories), (hub.objects, self.objects)):
            held.clear()
            held.update(found)
        hub.files.clear()
        for place, files in self.files.items():
            hub.files[place].update(files)
        hub.requests.clear()
        hub.planted = lambda number: None

    def published(self) -> Mapping[str, bytes]:
        return self.files.get((REPO, "main"), {})


NOTHING = Stored({}, {}, {})


class TornRelease:
    """Releases of one directory, to a Hub that holds nothing or an earlier release of it."""

    def __init__(self, made: Bench, hub: HubServer, existing: bool) -> None:
        self.made, self.hub, self.existing = made, hub, existing
        NOTHING.put_into(hub)
        if existing:
            made.prepared(RELEASE, False)
            self._succeeds(RELEASE.other(made.room, made.out(RELEASE)))
        self.before = Stored.of(hub)
        self.states = made.states(RELEASE, existing)
        self._prepare()
        self._succeeds(made.argv(RELEASE, existing))
        self.after = Stored.of(hub).published()
        self.requests = len(hub.requests)

    def series(self, tears: tuple[Tear, ...] = TEARS) -> Iterator[tuple[Tear, int]]:
        """Every tear at every request of a release."""
        for tear in tears:
            for nth in range(1, self.requests + 1):
                yield tear, nth

    def tried(self, tear: Tear, nth: int) -> None:
        """One release whose network tears, the same command once more, and the invariants."""
        tally, out = self.made.tally[RELEASE.name], self.made.out(RELEASE)
        self._prepare()
        self.hub.planted = tear.planted(nth, self._kill)
        done = self.made.run(self.made.argv(RELEASE, self.existing))
        self.hub.planted = lambda number: None
        tally.runs[tear.what] += 1
        try:
            self.made._judged(RELEASE, self.existing, KILLED if tear.killed else NONE, done, self.states)
            found = Stored.of(self.hub).published()
            if found != self.after and (found != self.before.published() or not done["status"]):
                raise BrokenInvariantError(f"the Hub holds neither the old release nor the new one: {sorted(found)}")
            if done["status"]:
                self._again(out)
            tally.ends[f"{tear.what}: {'published' if not done['status'] else 'published by the next run'}"] += 1
        except BrokenInvariantError as error:
            place = f"release over {'a release' if self.existing else 'nothing'}, {tear.what} at request {nth}"
            tally.broken.append(f"{place}: {error}")

    def _again(self, out: Path) -> None:
        arrived = set(self.hub.objects)
        self.hub.requests.clear()
        self._succeeds(self.made.argv(RELEASE, self.existing))
        if Stored.of(self.hub).published() != self.after:
            raise BrokenInvariantError("the next run did not publish the release")
        if sent := {path.rpartition("/")[2] for path in self.hub.asked("PUT", "/lfs/")} & arrived:
            raise BrokenInvariantError(f"sent again, though it had arrived: {', '.join(sorted(sent))}")

    def _prepare(self) -> None:
        self.made.prepared(RELEASE, self.existing)
        self.before.put_into(self.hub)

    def _succeeds(self, argv: Any) -> None:
        done = self.made.run(argv)
        if done["status"]:
            raise BrokenInvariantError(f"a release without a fault fails: {done['output'][-1500:]}")

    def _kill(self) -> None:
        """End the command that runs: it is the child of the process that starts commands."""
        server = self.made.server.pid
        for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
