"""A process that has imported everything and runs commands in forks of itself: a run costs what it does, no start.

Speaks JSON lines: a list of {"argv", "fault", "below", "user", "cwd"}, which run at once → a list of {"status",
"calls", "seconds", "output"}. `status` is the exit status, negative for a signal, 999 for a run that was ended because
it hung; `seconds` of the processor; `calls` None where the command did not live to count.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import IO, Any

LONGEST = 300.0
"""Seconds after which a run is taken for one that hangs."""


def main() -> None:
    _import_everything()
    _share()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        running = [_started(request) for request in json.loads(line)]
        answers = [_ended(each) for each in running]
        # What a command imported in its fork, the next one finds.
        for answer in answers:
            _import(answer.pop("modules"))
        _share()
        print(json.dumps(answers), flush=True)


def _share() -> None:
    """Keep the collector from what is there: walking through it, a fork would copy its memory."""
    gc.collect()
    gc.freeze()


def _import(names: list[str]) -> None:
    import importlib

    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def _import_everything() -> None:
    import importlib

    for name in (
        *("torch", "transformers", "peft", "accelerate", "weightport.cli", "weightport.adapters.porting"),
        *("weightport.adapters.extraction", "weightport.adapters.merging.merge", "weightport.converters.export"),
        *("weightport.converters.conversion", "weightport.release.publishing", "weightport.finetuning.training.run"),
        *("weightport.finetuning.evaluation.answering", "transformers.trainer", "transformers.modeling_utils"),
        *("transformers.models.florence2.modeling_florence2", "transformers.models.auto.modeling_auto"),
        *("transformers.models.bart.modeling_bart", "weightport.adapters.verification.verify"),
    ):
        importlib.import_module(name)
    _shorten_waiting()


def _shorten_waiting() -> None:
    """A request that is repeated, is so at once; the Hub may be silent for two seconds."""
    from huggingface_hub.utils import _http

    from weightport import hub
    from weightport.release import publishing

    hub.REQUEST_TIMEOUT = publishing.REQUEST_TIMEOUT = 2.0
    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


@dataclass(frozen=True)
class _Running:
    """A command at work: its process, the pipe where it counts, and the file that it prints to."""

    child: int
    pipe: int
    output: IO[bytes]


def _started(request: dict[str, Any]) -> _Running:
    output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the command has ended
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _run(request, output.fileno(), write_end)
    os.close(write_end)
    return _Running(child, read_end, output)


def _ended(running: _Running) -> dict[str, Any]:
    status, seconds = _waited(running.child)
    with os.fdopen(running.pipe, "rb") as pipe:
        said = json.loads(pipe.read() or b"{}")
    with running.output as output:
        output.seek(0)
        text = output.read().decode("utf-8", "backslashreplace")
    return {"status": status, "seconds": seconds, "calls": None, "modules": [], **said, "output": text[-8000:]}


def _waited(child: int) -> tuple[int, float]:
    """Exit status and processor seconds."""
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], LONGEST)
    os.close(handle)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else 999, used.ru_utime + used.ru_stime


def _run(request: dict[str, Any], output: int, pipe: int) -> None:
    """In the child: never returns."""
    status = 70
    try:
        from faults.shim import Fault, arm, counted, disarm

        known = set(sys.modules)
        os.setpgid(0, 0)
        # A shell's background jobs ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(request.get("environment", {}))
        os.chdir(request["cwd"])
        if request.get("user"):
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        arm(Fault(**request["fault"]), request["below"])
        status = _command(request["argv"])
        disarm()
        sys.stdout.flush()
        with os.fdopen(pipe, "w") as said:
            json.dump({"calls": counted(), "modules": sorted(set(sys.modules) - known)}, said)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _command(argv: list[str]) -> int:
    """The exit status of `weightport …`."""
    from weightport import cli

    try:
        cli.main(argv, prog_name="weightport", standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


if __name__ == "__main__":
    main()
