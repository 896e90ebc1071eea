"""A pickle as plain data: an interpreter of pickle's opcodes that imports nothing and calls nothing.

Python's own unpickler executes what a file tells it to. This one knows the same opcodes (`pickle_opcodes.py`) over a
checked stack (`pickle_machine.py`); the only functions that it ever calls are the builders of `symbols.py`. Classes
become Records. Time and memory are bounded by the length of the pickle (`pickle_budget.py`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from weightport.checkpoints.pickle.machine import Machine
from weightport.checkpoints.pickle.opcodes import HANDLERS
from weightport.checkpoints.pickle_budget import MAX_OPCODES
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError


def unpickle(
    data: bytes | SourceFile, where: str, persistent: Callable[[Any], Any] | None = None, start: int = 0
) -> tuple[Any, int]:
    """The object that the pickle at `data[start:]` describes, and the position after its last byte.

    `persistent` gives the object for a persistent id; it may raise CheckpointError. `where` begins error messages.
    Raises CheckpointError for a malformed pickle and UnsafeCheckpointError for one that names something dangerous.
    """
    machine = Machine(data, persistent, start)
    try:
        return _run(machine), machine.position
    except CheckpointError as error:
        raise type(error)(f"{where} {error}") from error


def _run(machine: Machine) -> Any:
    for _ in range(MAX_OPCODES):
        code = machine.opcode()
        if code == pickle.STOP[0]:
            return machine.pop()
        handler = HANDLERS.get(code)
        if handler is None:
            raise CheckpointError(
                f"is not a pickle, or a damaged one: byte {machine.position - 1} is no opcode ({code:#x})."
            )
        handler(machine)
    raise CheckpointError(f"has more than {MAX_OPCODES:,} pickle opcodes: no checkpoint needs so many.")
