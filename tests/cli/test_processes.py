"""Several processes end with one error: the first says what all find, and a broken connection is no error of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from weightport.cli import processes
from weightport.cli.running import command_body
from weightport.errors import UsageError


def ended(error: BaseException, monkeypatch: pytest.MonkeyPatch, rank: int, size: int = 2) -> Result:
    """A command that meets `error` as process `rank` of `size`."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))

    @click.command("train")
    @command_body
    @processes.one_error
    def train() -> None:
        raise error

    return CliRunner().invoke(train, [])


LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1000")


def test_first_process_says_at_once_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2):
        begun = time.monotonic()
        done = ended(UsageError("no such setting"), monkeypatch, 0, size)
        assert done.exit_code == 2 and "no such setting" in done.output
        assert time.monotonic() - begun < processes.GRACE / 2


def test_other_process_is_silent_when_the_launcher_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, status in ((UsageError("no such setting"), 2), (LOST, 1)):
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        done = ended(error, monkeypatch, 1)
        assert done.exit_code == status and not done.output, done.output


def test_process_alone_with_its_error_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.1)
    assert "no such setting" in ended(UsageError("no such setting"), monkeypatch, 1).output


@pytest.mark.parametrize("rank", [0, 1])
def test_lost_connection_is_no_defect(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.1)
    done = ended(LOST, monkeypatch, rank)
    assert done.exit_code == 1 and "Another process of this run has ended" in done.output
    assert "gloo" not in done.output and "defect" not in done.output
    assert "defect" in ended(RuntimeError("something else"), monkeypatch, rank).output


def test_usage_error_under_torchrun_is_printed_once(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("torchrun"))
    command = [program, "--standalone", "--nproc-per-node", "2", str(Path(sys.executable).with_name("port-finetune"))]
    (tmp_path / "config.json").write_text('{"model_type": "florence2"}')
    words = [str(tmp_path), "--data", "x.jsonl", "-o", str(tmp_path / "run"), "--recipe", "docvqua"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("port-finetune: There is no recipe 'docvqua'") == 1, done.stderr


def test_usage_error_that_parsing_finds_is_said_by_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("train", cls=processes.OneErrorCommand)
    @click.argument("model", type=click.Path(exists=True))
    def train(model: str) -> None:
        raise AssertionError(model)

    said: list[int] = []
    monkeypatch.setattr(processes, "_leave_the_word", lambda status: sys.exit(said.append(status) or status))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in (("0", "does not exist"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        done = CliRunner().invoke(train, ["nowhere"])
        assert done.exit_code == 2
        assert words in done.output and bool(words) == bool(done.output)
    assert said == [2]


@pytest.mark.parametrize(
    "said",
    ["DataLoader worker (pid(s) 8572) exited unexpectedly", "DataLoader worker (pid 12) is killed by signal: Killed."],
)
def test_a_reading_process_that_the_system_ended_is_no_defect(said: str) -> None:
    @click.command()
    @command_body
    def evaluate() -> None:
        raise RuntimeError(said)

    done = CliRunner().invoke(evaluate)
    assert done.exit_code == 1 and "memory runs out" in done.output and "defect" not in done.output
