"""What stands for the classes of a pickle: names and data, never code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from weightport.checkpoints.shown import printable, shown

_REPR_FIELDS = 6
_SLOTS = ("type_name", "args", "state", "_fields", "_entries", "_elements")


@dataclass(frozen=True, eq=False)
class Symbol:
    """A class or function that a pickle names, such as `argparse.Namespace`. Nothing was imported for it."""

    type_name: str

    def __repr__(self) -> str:
        return f"<{printable(self.type_name)}>"


class Record:
    """An object of a class that was not imported: what its pickle says of it, for reading only.

    `type_name`  the class, or the function that would have made the object: "argparse.Namespace"
    `args`       what the class or function would have been called with
    `fields`     the object's attributes
    `elements`   the items, where the class is a kind of list or set
    `entries`    the items, where the class is a kind of dictionary
    `state`      what `__setstate__` would have been given, where that is neither attributes nor None

    `record["name"]`, `record.get("name", default)` and `"name" in record` look at the fields, then the entries.
    Records may refer to each other in cycles, and are equal only to themselves.
    """

    __slots__ = ("_elements", "_entries", "_fields", "args", "state", "type_name")

    type_name: str
    args: tuple[Any, ...]
    state: Any
    _fields: dict[str, Any]
    _entries: dict[Any, Any]
    _elements: list[Any]

    def __init__(self, type_name: str, args: tuple[Any, ...] = ()) -> None:
        values: tuple[Any, ...] = (type_name, args, None, {}, {}, [])
        for name, value in zip(_SLOTS, values):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Record is for reading: {name} cannot be set")

    @property
    def fields(self) -> Mapping[str, Any]:
        return MappingProxyType(self._fields)

    @property
    def entries(self) -> Mapping[Any, Any]:
        return MappingProxyType(self._entries)

    @property
    def elements(self) -> tuple[Any, ...]:
        return tuple(self._elements)

    def __contains__(self, name: object) -> bool:
        return name in self._fields or name in self._entries

    def __getitem__(self, name: str) -> Any:
        return self._fields[name] if name in self._fields else self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._fields, **self._entries})

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or else the entry, of that name, or else `default`."""
        return self._fields.get(name, self._entries.get(name, default))

    def __repr__(self) -> str:
        # Names only: values may be huge, or lead back here.
        names = [shown(name, 40) for name in list(self)[:_REPR_FIELDS]]
        more = ["…"] if len(self._fields) + len(self._entries) > _REPR_FIELDS else []
        return f"<Record {printable(self.type_name)}({', '.join(names + more)})>"
