"""NumPy's scalars, types and arrays as pickles describe them, read as plain values without numpy's own unpickling."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from weightport.checkpoints.pickle.records import Record
from weightport.checkpoints.shown import shown
from weightport.errors import CheckpointError

_TYPE_CODE = re.compile(r"[<>|=]?(?:[biufc][0-9]{1,2}|[SU][0-9]{1,6})", re.ASCII)


class Pending(ABC):
    """An object that a pickle names before it describes it. `finish(state)` gives the value that takes its place."""

    __slots__ = ("memo_keys",)

    def __init__(self) -> None:
        self.memo_keys: list[int] = []

    @abstractmethod
    def finish(self, state: Any) -> Any:
        """The finished object, from the state that the pickle gives it."""


class PendingType(Pending):
    """numpy.dtype(code): its byte order follows in the state."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code

    def finish(self, state: Any) -> Any:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(order, str) or order not in ("<", ">", "|", "="):
            raise CheckpointError(f"a numpy type's state is not of numpy's form: {shown(state)}.")
        return self.numpy_type(order)

    def numpy_type(self, order: str = "=") -> np.dtype[Any] | Record:
        """The type, or a Record where its elements are not plain values (objects, dates, fields)."""
        if not _TYPE_CODE.fullmatch(self.code):
            return Record("numpy.dtype", (self.code,))
        try:
            kind = np.dtype(self.code)
        except TypeError as error:
            raise CheckpointError(f"numpy has no type {shown(self.code)}.") from error
        return kind.newbyteorder(">") if order == ">" else kind


class PendingArray(Pending):
    """numpy's empty array, to which (version, shape, type, Fortran order, bytes) follows in the state."""

    __slots__ = ()

    def finish(self, state: Any) -> Any:
        if not isinstance(state, tuple) or len(state) != 5:
            raise CheckpointError(f"a numpy array's state is not of numpy's form: {shown(state)}.")
        _, shape, kind, fortran, data = state
        return _array(data, kind, shape, "F" if isinstance(fortran, int) and fortran else "C")


def _array(data: Any, kind: Any, shape: Any, order: str) -> Any:
    if isinstance(kind, PendingType):
        kind = kind.numpy_type()
    if not isinstance(kind, np.dtype):
        return Record("numpy.ndarray", (shape, kind, data))
    if isinstance(data, str):
        # Python 2 wrote bytes as text.
        data = data.encode("latin-1", "replace")
    if isinstance(shape, int):
        shape = (shape,)
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 32:
        raise CheckpointError(f"a numpy array has the shape {shown(shape)}.")
    if not isinstance(data, (bytes, bytearray)) or len(data) != prod(shape) * kind.itemsize:
        raise CheckpointError(f"a numpy array of shape {shown(shape)} and type {kind} does not hold its bytes.")
    if not kind.itemsize:
        # numpy would give every text of no characters one, and so take memory that the file does not.
        return Record("numpy.ndarray", (shape, kind.str))
    if not data:
        try:
            return np.empty(shape, kind)
        except ValueError as error:
            raise CheckpointError(f"numpy cannot hold an array of shape {shown(shape)} ({error}).") from error
    require_unicode(data, kind)
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


def require_unicode(data: bytes | bytearray, kind: np.dtype[Any]) -> None:
    """Raises CheckpointError where `data`, of numpy's type `kind`, is text that holds what is no character.

    numpy looks at none of it, and would make Python strings that break whatever they meet.
    """
    if kind.kind != "U":
        return
    points = np.frombuffer(data, np.dtype("u4").newbyteorder(kind.byteorder))
    if bool(((points > 0x10FFFF) | ((points >= 0xD800) & (points <= 0xDFFF))).any()):
        raise CheckpointError(f"a numpy array of type {kind} holds text that is not Unicode.")


def build_type(code: Any = None, *_: Any) -> PendingType:
    if not isinstance(code, str):
        raise CheckpointError(f"a numpy type is named {shown(code)}.")
    return PendingType(code)


def build_array(*_: Any) -> PendingArray:
    return PendingArray()


def build_scalar(kind: Any, data: Any = b"") -> Any:
    """A numpy scalar, as the Python number or text that it is."""
    if isinstance(kind, PendingType):
        kind = kind.numpy_type()
    if not isinstance(kind, np.dtype):
        return Record("numpy.generic", (kind, data))
    value = _array(data, kind, (), "C")
    return value[()].item() if isinstance(value, np.ndarray) else value


def build_from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> Any:
    return _array(data, kind, shape, order)


ARRAY_BUILDERS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": build_type,
    **{f"numpy.{core}.multiarray._reconstruct": build_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": build_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": build_from_buffer for core in ("core", "_core")},
}
