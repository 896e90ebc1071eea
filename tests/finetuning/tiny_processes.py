"""Runs in processes of their own, which start at once because a server has imported everything that they need."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from weightport.finetuning.setup.preparing import Job

LIMIT = 120
"""Seconds after which a run that does not end is a failure."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["weightport.finetuning.training.run", "weightport.modeling", "transformers.trainer"])


def start(job: Job, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """The job in another process; its error, if any, is its exit status."""
    process = _CONTEXT.Process(target=_train, args=(job, dict(environment or {})))
    process.start()
    return process


def killed_at(job: Job, step: int) -> None:
    """Run the job until its checkpoint of `step` is whole, and end it by SIGKILL."""
    state = job.output / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"
    killed_when(job, lambda: _readable(state))


def killed_when(job: Job, reached: Callable[[], bool]) -> None:
    """Run the job until `reached` says that it has come as far as it should, and end it by SIGKILL."""
    process = start(job)
    end = time.monotonic() + LIMIT
    while not reached():
        assert process.is_alive() and time.monotonic() < end, "the run ended before it was to be killed"
        time.sleep(0.005)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"


def side_by_side(job: Job, processes: int, environment: Mapping[str, str] | None = None) -> list[int]:
    """Run the job in several processes that know of each other by what torchrun sets, with an `environment` besides;
    their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        **(environment or {}),
    }
    running = [start(job, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    for process in running:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in running]


def _readable(path: Path) -> bool:
    try:
        return "global_step" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def _train(job: Job, environment: Mapping[str, Any]) -> None:
    os.environ.update(environment)
    import torch

    from weightport.finetuning.training.run import finetune

    torch.set_num_threads(1)
    finetune(job, quiet=True)
