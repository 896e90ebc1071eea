"""What a pickle may have done for it: bounded by its length, each limit by a name of its own."""

from __future__ import annotations

from typing import Any

from weightport.checkpoints.pickle.records import Record
from weightport.checkpoints.shown import shown
from weightport.checkpoints.types import TensorRef
from weightport.errors import CheckpointError

# Far above what checkpoints hold (OFA: 24,000 opcodes). An opcode takes a byte of the file, an object up to 300 bytes
# of memory.
MAX_OPCODES = 10_000_000
MAX_OBJECTS = 4_000_000
# Dictionaries are keyed by text and by small numbers. Others can be chosen so that they all meet in one place of the
# dictionary, where each is compared with all before it.
MAX_ODD_KEYS = 5_000
_SMALL_NUMBER = 1 << 20
_KEY_PARTS = 16
_KEY_DEPTH = 3

# A pickle describes an item in a byte or more, and needs it copied once or twice. A copied item takes 10 to 100 bytes.
_COPIES_PER_BYTE = 2
_MAX_COPIES = 32_000_000
_CHARACTERS_PER_COPY = 64
_CONTAINERS = (list, tuple, dict, set, frozenset)
_TEXTS = (str, bytes, bytearray)


class Budget:
    """What is left for one pickle of `length` bytes. Every method raises CheckpointError when that is used up."""

    def __init__(self, length: int) -> None:
        self._copies = min(_COPIES_PER_BYTE * length + 4096, _MAX_COPIES)
        self._objects = MAX_OBJECTS
        self._odd_keys = MAX_ODD_KEYS

    def copy(self, *values: Any) -> None:
        """Count the items of `values`, which are about to be copied: a pickle can name the same data over and over."""
        for value in values:
            if isinstance(value, _CONTAINERS):
                self._copies -= len(value)
            elif isinstance(value, _TEXTS):
                self._copies -= len(value) // _CHARACTERS_PER_COPY
        self._copies -= len(values)
        if self._copies < 0:
            raise CheckpointError("copies its own data over and over, as no checkpoint does.")

    def make(self, count: int = 1) -> None:
        """Count `count` small objects that are about to be made."""
        self._objects -= count
        if self._objects < 0:
            raise CheckpointError(f"describes more than {MAX_OBJECTS:,} objects: no checkpoint needs so many.")

    def key(self, key: Any) -> Any:
        """`key` for use in a dictionary or set; a tensor is wrapped in a Record, since its own hash changes later.

        Raises CheckpointError too for what has no hash, or is so long that hashing it would be an attack.
        """
        if isinstance(key, str) or (type(key) is int and -_SMALL_NUMBER < key < _SMALL_NUMBER):
            return key
        found, parts, numbers = _hashable(key, _KEY_DEPTH)
        if parts > _KEY_PARTS:
            raise CheckpointError(f"a dictionary or set has a key of {parts} parts; the longest have {_KEY_PARTS}.")
        self._odd_keys -= numbers
        if self._odd_keys < 0:
            raise CheckpointError(
                f"has more than {MAX_ODD_KEYS:,} dictionary keys of other numbers than small whole ones: no "
                "checkpoint needs so many."
            )
        return found


def _hashable(key: Any, depth: int) -> tuple[Any, int, bool]:
    """`key` with its tensors wrapped, of how many parts it is made, and whether numbers are among them."""
    if isinstance(key, TensorRef):
        return Record("torch.Tensor", (key,)), 1, False
    if isinstance(key, (tuple, frozenset)) and depth and len(key) <= _KEY_PARTS:
        made = [_hashable(part, depth - 1) for part in key]
        parts = 1 + sum(parts for _, parts, _ in made)
        return type(key)(part for part, _, _ in made), parts, any(numbers for _, _, numbers in made)
    if isinstance(key, (tuple, frozenset)) or getattr(type(key), "__hash__", None) is None:
        raise CheckpointError(f"a dictionary or set has {shown(key)} for a key, which cannot be one.")
    return key, 1, isinstance(key, (int, float, complex)) and not isinstance(key, bool)
