"""Configurations pickled as omegaconf objects, read back as the dictionaries and lists that they stand for."""

from __future__ import annotations

from typing import Any

from weightport.checkpoints.pickle.records import Record
from weightport.errors import ConfigurationError

_CONTAINERS = frozenset({"omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"})
_NODES = "omegaconf.nodes."
_NAMESPACES = frozenset({"argparse.Namespace", "types.SimpleNamespace"})
# Configurations are a few levels deep; a file that nests deeper is meant to exhaust the stack.
_MAX_DEPTH = 64


def is_omegaconf(value: Any) -> bool:
    """Whether `value` is a DictConfig, a ListConfig or one of their value nodes, of omegaconf 2.0 or later."""
    return isinstance(value, Record) and (value.type_name in _CONTAINERS or value.type_name.startswith(_NODES))


def unwrapped(value: Any) -> Any:
    """What the omegaconf object `value` holds, one level of it; any other value as it is.

    Containers keep theirs in `_content` and value nodes in `_val`, in 2.0.x as in 2.1 and later. Links to parents,
    types and flags are left. Interpolations ("${task.data}") and missing values ("???") stay text.
    """
    for _ in range(_MAX_DEPTH):
        if not is_omegaconf(value):
            break
        value = value.get("_content" if value.type_name in _CONTAINERS else "_val")
    return value


def to_plain(value: Any) -> Any:
    """`value` with every omegaconf object, Namespace and enumeration member in it replaced by plain data.

    A Namespace becomes the dictionary of its attributes, an enumeration member its value; Records of other classes
    stay. Raises ConfigurationError where the data leads back into itself.
    """
    return _Plain().convert(value, _MAX_DEPTH)


class _Plain:
    def __init__(self) -> None:
        # By identity, with the original kept alive: data that is shared is converted once, however often it is used.
        self.done: dict[int, tuple[Any, Any]] = {}

    def convert(self, value: Any, depth: int) -> Any:
        value = unwrapped(value)
        if not isinstance(value, (dict, list, tuple, Record)):
            return value
        if depth == 0 or is_omegaconf(value):
            raise ConfigurationError(f"The checkpoint's options nest over {_MAX_DEPTH} levels deep, or in a circle.")
        if id(value) not in self.done:
            self.done[id(value)] = (value, self._converted(value, depth - 1))
        return self.done[id(value)][1]

    def _converted(self, value: Any, depth: int) -> Any:
        if isinstance(value, Record) and value.type_name in _NAMESPACES:
            return {name: self.convert(item, depth) for name, item in value.fields.items()}
        if isinstance(value, Record):
            return _member_value(value)
        if isinstance(value, dict):
            return {_member_value(key): self.convert(item, depth) for key, item in value.items()}
        return type(value)(self.convert(item, depth) for item in value)


def _member_value(value: Any) -> Any:
    """The value of an enumeration member, which is pickled as its class called with it; anything else as it is."""
    if isinstance(value, Record) and len(value.args) == 1 and not value.fields:
        return value.args[0] if isinstance(value.args[0], (str, int, float)) else value
    return value
