"""A process that has imported everything and runs commands in forks of itself: a run costs what it does, no start.

Speaks JSON lines: {"argv", "fault", "below", "user", "cwd"} → {"status", "calls", "output"}. `status` is the exit
status, negative for a signal; `calls` None where the command did not live to count.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

LONGEST = 300.0
"""Seconds after which a run is taken for one that hangs."""


def main() -> None:
    _import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


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


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            _run(request, output.fileno(), write_end)
        os.close(write_end)
        status = _waited(child)
        with os.fdopen(read_end, "rb") as pipe:
            calls = pipe.read()
        output.seek(0)
        text = output.read().decode("utf-8", "backslashreplace")
    return {"status": status, "calls": int(calls) if calls else None, "output": text[-8000:]}


def _waited(child: int) -> int:
    until = time.monotonic() + LONGEST
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 999


def _run(request: dict[str, Any], output: int, pipe: int) -> None:
    """In the child: never returns."""
    status = 70
    try:
        from faults.shim import Fault, arm, counted, disarm

        os.setpgid(0, 0)
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
        os.write(pipe, str(counted()).encode())
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
