"""The stack, the marks and the memo that a pickle's opcodes work on, with every access checked."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from weightport.checkpoints.pickle.numpy_arrays import Pending
from weightport.checkpoints.pickle.symbols import call, find_symbol
from weightport.checkpoints.pickle_budget import Budget
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError

# Names of classes, persistent ids and numbers in text form.
_MAX_LINE = 4096
# A pickle in a file does not say how long it is, so it is read ahead in blocks.
_BLOCK_BYTES = 1 << 18


class Machine:
    """The stack machine that pickles are programs for. `data[at]` is the next byte of those that were read so far."""

    def __init__(self, source: bytes | SourceFile, persistent: Callable[[Any], Any] | None, start: int = 0) -> None:
        self.file = source if isinstance(source, SourceFile) else None
        self.size = source.size if isinstance(source, SourceFile) else len(source)
        self.data = b"" if isinstance(source, SourceFile) else source
        self.before = start if isinstance(source, SourceFile) else 0
        self.at = 0 if isinstance(source, SourceFile) else start
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = Budget(self.size)

    @property
    def position(self) -> int:
        """The next byte's place in the whole."""
        return self.before + self.at

    def has(self, length: int) -> bool:
        """Whether the next `length` bytes are there, read ahead if need be."""
        if self.at + length <= len(self.data):
            return True
        if self.file is None or self.position + length > self.size:
            return False
        ahead = self.before + len(self.data)
        missing = max(self.at + length - len(self.data), min(_BLOCK_BYTES, self.size - ahead))
        self.data = self.data[self.at :] + self.file.read(ahead, missing, "its pickle")
        self.before, self.at = self.position, 0
        return True

    def opcode(self) -> int:
        if self.at >= len(self.data) and not self.has(1):
            raise CheckpointError(f"ends too early, at byte {self.position}, without its end mark.")
        self.at += 1
        return self.data[self.at - 1]

    def take(self, length: int) -> bytes:
        if length < 0 or not self.has(length):
            raise CheckpointError(
                f"ends too early: {length} bytes are missing at byte {self.position} of {self.size}."
            )
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        self.has(min(_MAX_LINE, self.size - self.position))
        end = self.data.find(b"\n", self.at, self.at + _MAX_LINE)
        if end < 0:
            raise CheckpointError(f"has a line without an end at byte {self.position}.")
        text = self.data[self.at : end]
        self.at = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def make(self, value: Any) -> None:
        """Push a container or object that was made for this opcode."""
        self.budget.make()
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise CheckpointError(f"takes more from its stack than there is, at byte {self.position}.")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise CheckpointError(f"refers to a mark that is not there, at byte {self.position}.")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def put(self, key: int) -> None:
        # Picklers count their objects, so that no number is larger than the pickle is long.
        if not 0 <= key <= self.position:
            raise CheckpointError(f"gives an object the number {shown(key)}, at byte {self.position}.")
        self.budget.make()
        value = self.memo[key] = self.top()
        if isinstance(value, Pending):
            value.memo_keys.append(key)

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise CheckpointError(f"refers to object {key}, which it has not described before byte {self.position}.")
        self.push(self.memo[key])

    def call(self, function: Any, args: Any) -> Any:
        return call(function, args, self.budget)

    def find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MAX_LINE:
            raise CheckpointError(f"names a class by {shown(module)} and {shown(name)}.")
        return find_symbol(module, name)

    def resolve(self, key: Any) -> Any:
        if self.persistent is None:
            raise CheckpointError("refers to data outside itself, where there is none.")
        return self.persistent(key)
