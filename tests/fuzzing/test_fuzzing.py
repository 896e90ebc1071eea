"""A bounded run of the fuzzer over every reader, what earlier runs found, and the judge itself."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from fuzzing import cases
from fuzzing.campaign import Campaign, Target, judged_in_worker, minimised
from fuzzing.judge import COMPARED, FINDING, REFUSED, MismatchError
from fuzzing.targets import MILLISECONDS, TARGETS
from weightport.errors import CheckpointError

SEED = 20260729
"""Of the bounded run: the same inputs each time, so that it fails for what was changed."""
INPUTS = 40
FINDINGS = Path(__file__).with_name("findings")
KEPT = sorted(path for target in FINDINGS.iterdir() for path in target.iterdir()) if FINDINGS.is_dir() else []


@pytest.mark.parametrize("name", [name for name, cost in MILLISECONDS.items() if cost < 20])
def test_no_input_of_a_bounded_run_is_a_finding(name: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    campaign = Campaign(TARGETS[name], SEED)
    try:
        campaign.batch(INPUTS)
        assert campaign.result.findings == {}
        assert campaign.result.inputs == INPUTS and campaign.result.counts[REFUSED] < INPUTS
    finally:
        campaign.close()


@pytest.mark.parametrize("kept", KEPT, ids=[f"{path.parent.name}-{path.name}" for path in KEPT])
def test_what_was_found_is_found_no_more(kept: Path) -> None:
    verdict = judged_in_worker(TARGETS[kept.parent.name], cases.read(kept))
    assert verdict.kind != FINDING, verdict.detail


def seeds(folder: Path) -> list[cases.Case]:
    return [{"in.txt": b"good"}]


def planted(fault: str):
    """A reader that refuses what does not begin with `good`, and makes this mistake when the input holds an X."""

    def read(folder: Path) -> str:
        data = (folder / "in.txt").read_bytes()
        if not data.startswith(b"good"):
            raise CheckpointError("not good")
        if b"X" in data:
            MISTAKES[fault]()
        return data.decode("latin-1")

    return read


def _loop() -> None:
    until = time.process_time() + 30
    while time.process_time() < until:
        pass


def _take() -> None:
    bytearray(2 << 30)


def _say_half() -> None:
    raise CheckpointError(" ")


MISTAKES = {
    "ValueError": lambda: int("x"),
    "OSError": lambda: os.close(-1),
    "RecursionError": lambda: (lambda f: f(f))(lambda f: f(f)),
    "MemoryError": _take,
    "overtime": _loop,
    "ended the process": lambda: os.abort(),
    "message of a wrong length": _say_half,
}


@pytest.mark.parametrize("fault", MISTAKES)
def test_a_planted_mistake_is_a_finding(fault: str) -> None:
    target = Target("planted", seeds, lambda rng, case, corpus: case, planted(fault))
    assert judged_in_worker(target, {"in.txt": b"good X"}).key.startswith(fault)
    assert judged_in_worker(target, {"in.txt": b"bad X"}).kind == REFUSED


def test_a_planted_difference_is_a_finding() -> None:
    def compare(folder: Path, found: str) -> bool:
        if found != "good":
            raise MismatchError("text: another")
        return True

    target = Target("planted", seeds, lambda rng, case, corpus: case, planted("ValueError"), compare)
    assert judged_in_worker(target, {"in.txt": b"good"}).kind == COMPARED
    assert judged_in_worker(target, {"in.txt": b"good?"}).key == "mismatch text"


def test_a_campaign_goes_on_after_a_worker_was_ended() -> None:
    def change(rng, case, corpus):
        return {"in.txt": rng.choice((b"good", b"good X", b"bad"))}

    campaign = Campaign(Target("planted", seeds, change, planted("ended the process")), 1)
    try:
        campaign.batch(30)
        assert campaign.result.inputs == 30 and campaign.result.counts[REFUSED] > 3
        assert list(campaign.result.findings) == [f"ended the process: {-6}"]
    finally:
        campaign.close()


def test_new_lines_of_a_reader_lead() -> None:
    """A reader behind a chain of checks: without the corpus no change of one byte gets through."""
    from weightport.checkpoints.json_text import parse_json

    def read(folder: Path) -> object:
        try:
            return parse_json((folder / "in.txt").read_bytes())
        except ValueError as error:
            raise CheckpointError("no JSON") from error

    def change(rng, case, corpus):
        return {"in.txt": rng.choice((b"[]", b'"\\u0041"', b"x"))}

    campaign = Campaign(Target("planted", lambda folder: [{"in.txt": b"[]"}], change, read), 1)
    try:
        campaign.batch(40)
        assert {"in.txt": b'"\\u0041"'} in campaign.corpus
    finally:
        campaign.close()


def test_a_finding_is_made_small() -> None:
    target = Target("planted", seeds, lambda rng, case, corpus: case, planted("OSError"))
    case = {"in.txt": b"good" + b"." * 40 + b"X" + b"," * 40, "other.txt": b"nothing"}
    verdict = judged_in_worker(target, case)
    assert minimised(target, case, verdict.key) == {"in.txt": b"goodX"}
    assert os.strerror(errno.EBADF) in verdict.detail
