"""The stack, the marks and the memo that a pickle's opcodes work on, with every access checked."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from typing import Any

from weightport.checkpoints.mapped_file import shown
from weightport.checkpoints.pickle.numpy_arrays import Pending
from weightport.checkpoints.pickle.symbols import call, copies, find_symbol
from weightport.errors import CheckpointError

# Names of classes, persistent ids and numbers in text form.
_MAX_LINE = 4096
_SIZED = (list, tuple, dict, set, frozenset, str, bytes, bytearray)


class Machine:
    """The stack machine that pickles are programs for."""

    def __init__(self, data: bytes | mmap.mmap, persistent: Callable[[Any], Any] | None, start: int = 0) -> None:
        self.data = data
        self.at = start
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # Builders copy what they are given; a pickle may have no more copied than its length warrants.
        self.allowance = 4 * min(len(data), 1 << 26) + 4096

    def opcode(self) -> int:
        if self.at >= len(self.data):
            raise CheckpointError(f"ends too early, at byte {self.at}, without its end mark.")
        self.at += 1
        return self.data[self.at - 1]

    def take(self, length: int) -> bytes:
        piece = self.data[self.at : self.at + length]
        if length < 0 or len(piece) != length:
            raise CheckpointError(f"ends too early: {length} bytes are missing at byte {self.at} of {len(self.data)}.")
        self.at += length
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + _MAX_LINE)
        if end < 0:
            raise CheckpointError(f"has a line without an end at byte {self.at}.")
        text = self.data[self.at : end]
        self.at = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise CheckpointError(f"takes more from its stack than there is, at byte {self.at}.")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise CheckpointError(f"refers to a mark that is not there, at byte {self.at}.")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def put(self, key: int) -> None:
        value = self.memo[key] = self.top()
        if isinstance(value, Pending):
            value.memo_keys.append(key)

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise CheckpointError(f"refers to object {key}, which it has not described before byte {self.at}.")
        self.push(self.memo[key])

    def call(self, function: Any, args: Any) -> Any:
        if isinstance(args, tuple) and copies(function):
            self.allowance -= sum(len(value) for value in args if isinstance(value, _SIZED))
            if self.allowance < 0:
                raise CheckpointError("copies its own data over and over, as no checkpoint does.")
        return call(function, args)

    def find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MAX_LINE:
            raise CheckpointError(f"names a class by {shown(module)} and {shown(name)}.")
        return find_symbol(module, name)

    def resolve(self, key: Any) -> Any:
        if self.persistent is None:
            raise CheckpointError("refers to data outside itself, where there is none.")
        return self.persistent(key)
