"""A command in several processes (torchrun, accelerate launch) ends with one error, not with one from each."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from weightport.cli.running import Terminated
from weightport.errors import TrainingError, WeightportError

GRACE = 10.0
"""Seconds that a process waits before it speaks where another one may be about to: the launcher ends it meanwhile."""

_SIGNS_OF_A_LOST_PEER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def one_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command's function: what every process finds wrong is said by the first alone, and a connection that
    broke because another process ended is not called an error of its own. A process alone with its error says it,
    after a pause."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _several():
            return function(*args, **kwargs)
        first = _is_first()
        try:
            return function(*args, **kwargs)
        except WeightportError as error:
            if not first:
                _leave_the_word(error.exit_status)
            raise
        except RuntimeError as error:
            if not lost_peer(error):
                raise
            _leave_the_word(1)
            raise TrainingError(
                "Another process of this run has ended: its own error, or the launcher's summary, says why."
            ) from error
        except (KeyboardInterrupt, Terminated):
            if not first:
                sys.exit(1)
            raise

    return run


class OneErrorCommand(click.Command):
    """A command whose usage errors, which every process of a run finds, are said by the first alone."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.ClickException as error:
            if _several() and not _is_first():
                _leave_the_word(error.exit_code)
            raise


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def lost_peer(error: RuntimeError) -> bool:
    """Whether this is what torch.distributed raises where another process has gone."""
    return type(error).__name__.startswith("Dist") or any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER)


def _leave_the_word(status: int) -> None:
    """Wait for the launcher's signal, and end without a word when it comes."""
    try:
        # Of the processes on a machine that the first is not on, one speaks before the others.
        time.sleep(GRACE + int(os.environ.get("LOCAL_RANK", "0")))
    except (KeyboardInterrupt, Terminated):
        sys.exit(status)
