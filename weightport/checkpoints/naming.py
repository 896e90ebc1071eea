"""Names for the tensors of nested data: the keys on the way to each, joined with dots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from weightport.checkpoints.mapped import shown
from weightport.checkpoints.records import Record
from weightport.checkpoints.types import TensorRef
from weightport.errors import CheckpointError

# Shared containers are walked at every place they stand at; data that shares itself without end is cut off here.
_MAX_STEPS = 5_000_000
_MAX_DEPTH = 1_000
_MAX_NAME = 4_096
# torch.nn.Module keeps its parts in dictionaries of these names, which its state_dict leaves out.
_MODULE_FIELDS = frozenset({"_modules", "_parameters", "_buffers"})


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
    # Cycles are cut at containers already on the way down; records, which link to their parents, are entered once.
    path: set[int] = {id(document)}
    entered: set[int] = {id(document)}
    levels = [(id(document), "", _children(document))]
    for _ in range(_MAX_STEPS):
        if not levels:
            return found
        owner, prefix, children = levels[-1]
        step = next(children, None)
        if step is None:
            levels.pop()
            path.discard(owner)
            continue
        key, value = step
        if not isinstance(value, (TensorRef, dict, list, tuple, Record)):
            continue
        name = f"{prefix}.{key}" if prefix and key else prefix or key
        if len(levels) > _MAX_DEPTH or len(name) > _MAX_NAME:
            raise CheckpointError(
                f"nests {len(levels)} containers, or has a name of {len(name)} characters: {shown(name)}."
            )
        if isinstance(value, TensorRef):
            _add(found, name, value)
        elif id(value) not in path:
            if isinstance(value, Record) and id(value) in entered:
                continue
            entered.add(id(value))
            path.add(id(value))
            levels.append((id(value), name, _children(value)))
    raise CheckpointError("nests the same data in itself over and over, as no checkpoint does.")


def _children(container: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(container, dict):
        for position, (key, value) in enumerate(container.items()):
            yield _segment(key, position), value
    elif isinstance(container, (list, tuple)):
        for position, value in enumerate(container):
            yield str(position), value
    elif isinstance(container, Record):
        for name, value in container.fields.items():
            yield "" if name in _MODULE_FIELDS else name, value
        yield from _children(dict(container.entries))
        yield from _children(container.elements)
        yield from (("args", container.args), ("state", container.state))


def _segment(key: Any, position: int) -> str:
    if isinstance(key, str):
        return key
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
