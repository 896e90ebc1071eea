"""How every command runs: one error printed once, an exit status for scripts, a clean end on signals."""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from weightport.cli.display import echo, of_error
from weightport.errors import WeightportError

# Read by torch at its first tensor: large tensors are asked for in huge pages. Where fresh memory costs more than the
# arithmetic on it (weights that are widened, merged or copied piece by piece), that is most of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

Command = TypeVar("Command", bound=Callable[..., Any])

_LOST_WORKER = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (exited unexpectedly|is killed by signal)")

INTERRUPTED = 130
"""128 + SIGINT: what shells report for a command ended with Ctrl-C."""


class Terminated(BaseException):
    """SIGTERM arrived: unwinds like Ctrl-C, so that partial outputs are removed."""


def command_body(function: Command) -> Command:
    """Wrap a command: WeightportError becomes its message and exit status; a traceback is shown with --debug only."""

    @functools.wraps(function)
    def run(*args: Any, debug: bool, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return function(*args, **kwargs)
        except WeightportError as error:
            if debug:
                raise
            fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            fail("interrupted; nothing was left behind.", INTERRUPTED)
        except Terminated:
            fail("terminated; nothing was left behind.", 128 + signal.SIGTERM)
        except BrokenPipeError:
            # The reader of our output went away (`… | head`): nothing is wrong with the work.
            sys.stderr.close()
            sys.exit(0)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except MemoryError:
            fail("out of memory.", 1)
        except Exception as error:
            if debug:
                raise
            if _LOST_WORKER.search(str(error)):
                fail(
                    "a process that reads the data was ended by the system, as happens when memory runs out. Free "
                    "memory, or read in this process: --set training.dataloader_num_workers=0.",
                    1,
                )
            fail(
                f"unexpected {type(error).__name__}: {error}\n"
                "  This is a defect of weightport; run again with --debug for the traceback and report it.",
                1,
            )

    return debug_option(run)  # type: ignore[return-value]


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports without garbage collection, which would walk through all that they build, again and again and once more
    at the end of the process, to free nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


debug_option = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")


def fail(message: str, status: int) -> None:
    """Print `program: message` to standard error and end with `status`."""
    name = click.get_current_context().find_root().info_name or "weightport"
    echo(of_error(f"{name}: {message}"), err=True)
    sys.exit(status)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
