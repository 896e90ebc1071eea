"""Names for the tensors of nested data: the keys on the way to each, joined with dots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from weightport.checkpoints.pickle.records import Record
from weightport.checkpoints.shown import printable, shown
from weightport.checkpoints.types import TensorRef
from weightport.errors import CheckpointError

# Containers are walked at every place they stand at; data that shares itself without end is refused after this many.
_MAX_REPEATS = 250_000
_MAX_DEPTH = 1_000
_MAX_NAME = 4_096
# All names together, in characters: a name repeats the keys on its way, which a file holds once.
_MAX_NAMES = 64_000_000
# torch.nn.Module keeps its parts in dictionaries of these names, which its state_dict leaves out.
_MODULE_FIELDS = frozenset({"_modules", "_parameters", "_buffers"})


def tensor_name(name: str) -> str:
    """A tensor's own name as it is called here: printable. Raises CheckpointError for an endless one."""
    if len(name) > _MAX_NAME:
        raise CheckpointError(f"a tensor has a name of {len(name)} characters; the longest have {_MAX_NAME}.")
    return printable(name)


def name_tensors(document: Any) -> dict[str, TensorRef]:
    """Every tensor of `document` by its name, in the order of the file.

    Keys that are not text are named by str() (whole numbers) or by their position; lists and tuples count from 0; a
    record goes by its fields. A tensor that stands alone is "tensor". Each ref in `document` is given the name of the
    first place it stands at. Raises CheckpointError where two tensors would have one name.
    """
    found: dict[str, TensorRef] = {}
    if isinstance(document, TensorRef):
        _add(found, "tensor", document)
        return found
    walk = _Walk(found)
    walk.enter("", document)
    while walk.levels:
        walk.step()
    return found


class _Walk:
    """A walk in depth, without recursion. Cycles are cut; what is known to hold no tensor is not walked again."""

    def __init__(self, found: dict[str, TensorRef]) -> None:
        self.found = found
        self.levels: list[_Level] = []
        self.path: set[int] = set()
        self.entered: set[int] = set()
        self.barren: set[int] = set()
        self.repeats = 0
        self.named = 0

    def enter(self, name: str, container: Any) -> None:
        owner = id(container)
        known = owner in self.entered
        # Records link to their parents and siblings, so walking them again would name everything in every way.
        if owner in self.path or owner in self.barren or (known and isinstance(container, Record)):
            return
        self.entered.add(owner)
        self.path.add(owner)
        self.levels.append(_Level(owner, name, _children(container), known, len(self.found)))

    def step(self) -> None:
        level = self.levels[-1]
        for key, value in level.children:
            self.repeats += level.again
            if isinstance(value, _WITH_TENSORS):
                self.visit(level.name, key, value)
                return
        self.levels.pop()
        self.path.discard(level.owner)
        if len(self.found) == level.found_before:
            self.barren.add(level.owner)

    def visit(self, prefix: str, key: str, value: Any) -> None:
        name = f"{prefix}.{key}" if prefix and key else prefix or key
        if len(self.levels) > _MAX_DEPTH or len(name) > _MAX_NAME:
            raise CheckpointError(
                f"nests its data {len(self.levels)} levels deep, with a name of {len(name)} characters: {shown(name)}."
            )
        if self.repeats > _MAX_REPEATS:
            raise CheckpointError("holds the same data in itself over and over, as no checkpoint does.")
        if isinstance(value, TensorRef):
            self.named += len(name)
            if self.named > _MAX_NAMES:
                raise CheckpointError(f"names its tensors with more than {_MAX_NAMES:,} characters in all.")
            _add(self.found, name, value)
        else:
            self.enter(name, value)


@dataclass(frozen=True)
class _Level:
    owner: int
    name: str
    children: Iterator[tuple[str, Any]]
    again: bool
    found_before: int


_WITH_TENSORS = (TensorRef, dict, list, tuple, Record)


def _children(container: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(container, dict):
        for position, (key, value) in enumerate(container.items()):
            yield _segment(key, position), value
    elif isinstance(container, (list, tuple)):
        for position, value in enumerate(container):
            yield str(position), value
    elif isinstance(container, Record):
        for name, value in container.fields.items():
            yield "" if name in _MODULE_FIELDS else printable(name[: _MAX_NAME + 1]), value
        yield from _children(dict(container.entries))
        yield from _children(container.elements)
        yield from (("args", container.args), ("state", container.state))


def _segment(key: Any, position: int) -> str:
    if isinstance(key, str):
        return printable(key[: _MAX_NAME + 1])
    return str(key) if isinstance(key, (int, float, bool, type(None))) else str(position)


def _add(found: dict[str, TensorRef], name: str, ref: TensorRef) -> None:
    if name in found:
        raise CheckpointError(f"holds two tensors that would both be named {shown(name)}.")
    if ref.name:
        ref = replace(ref, name=name)
    else:
        # The one place where a ref changes: readers make it before they can know where it will stand.
        object.__setattr__(ref, "name", name)
    found[name] = ref
