"""What a checkpoint holds, for people: sections with their sizes, and the document as JSON-able data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightport.checkpoints.dtypes import is_dtype
from weightport.checkpoints.pickle.records import Record, Symbol
from weightport.checkpoints.shown import printable, shown
from weightport.checkpoints.types import Checkpoint, TensorRef

_CUT = "…"
# Where configuration objects keep what they stand for: omegaconf's containers and value nodes.
_HELD_IN = ("_content", "_val")


@dataclass(frozen=True)
class Section:
    """The tensors under one top-level key of a checkpoint; `name` is "" for those that stand at the top themselves.

    `nbytes` counts a tensor that is stored once and named twice once, `values` every element of every tensor, `dtypes`
    the tensors of each type. Nothing was read to find it out.
    """

    name: str
    tensors: int
    nbytes: int
    values: int
    dtypes: Mapping[str, int]


def sections(checkpoint: Checkpoint) -> tuple[Section, ...]:
    """The sections of `checkpoint` in file order: of a training checkpoint, its model, its optimizer's state, …."""
    document = checkpoint.document
    keys = {
        printable(key) if isinstance(key, str) else shown(key)
        for key, value in (document.items() if isinstance(document, dict) else ())
        if isinstance(value, (dict, list, tuple, Record))
    }
    lengths = sorted({len(key) for key in keys}, reverse=True)
    found: dict[str, list[TensorRef]] = {}
    for name, ref in checkpoint.tensors.items():
        # The head of a name is the key up to a dot; keys that hold dots themselves are looked for among the keys.
        head = name.split(".", 1)[0]
        if head not in keys:
            head = _longest_start(name, keys, lengths)
        found.setdefault(head, []).append(ref)
    return tuple(
        Section(
            name,
            len(refs),
            _distinct_bytes(refs),
            sum(ref.numel for ref in refs),
            Counter(ref.element.name for ref in refs),
        )
        for name, refs in found.items()
    )


def _longest_start(name: str, keys: set[str], lengths: list[int]) -> str:
    """The longest key that `name` goes on from with a dot, or ""; `lengths` are those of the keys, longest first."""
    starts = (name[:length] for length in lengths if name[length : length + 1] == ".")
    return next((start for start in starts if start in keys), "")


def _distinct_bytes(refs: list[TensorRef]) -> int:
    return sum({(ref.storage or ref.name, ref.shape, ref.element): ref.nbytes for ref in refs}.values())


def plain(document: Any, *, depth: int = 6, items: int = 1000, text: int = 500) -> Any:
    """`document` as data that `json.dumps` takes, for showing: what JSON has no form for is described in words.

    At most `depth` levels, `items` entries of a container and `text` characters of a string are given, and 100,000
    values in all; "…" stands for the rest. Cycles are cut. Tensors are "float32 [3, 4]". Keys become text.
    """
    return _Plain(items, text).convert(document, depth, frozenset())


class _Plain:
    def __init__(self, items: int, text: int) -> None:
        self.items = items
        self.text = text
        self.left = 100_000

    def convert(self, value: Any, depth: int, above: frozenset[int]) -> Any:
        self.left -= 1
        value = _held(value)
        if isinstance(value, (dict, list, tuple, set, frozenset, Record)):
            if id(value) in above:
                return "<cycle>"
            if depth <= 0 or self.left <= 0:
                return _CUT
            return self._container(value, depth - 1, above | {id(value)})
        return self._leaf(value)

    def _container(self, value: Any, depth: int, above: frozenset[int]) -> Any:
        if isinstance(value, dict):
            return self._mapping(value, depth, above)
        if isinstance(value, Record):
            parts: dict[Any, Any] = {"__type__": value.type_name, **value.entries, **value.fields}
            extra = {"__args__": value.args, "__items__": value.elements, "__state__": value.state}
            return self._mapping({**parts, **{key: part for key, part in extra.items() if part}}, depth, above)
        converted: list[Any] = []
        for index, item in enumerate(value):
            if index == self.items or self.left <= 0:
                return [*converted, _CUT]
            converted.append(self.convert(item, depth, above))
        return converted

    def _mapping(self, value: Mapping[Any, Any], depth: int, above: frozenset[int]) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for index, (key, item) in enumerate(value.items()):
            if index == self.items or self.left <= 0:
                converted[_CUT] = f"{len(value) - index} more"
                break
            named = printable(key[: self.text]) if isinstance(key, str) else shown(key)
            converted[named] = self.convert(item, depth, above)
        return converted

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, str):
            return value if len(value) <= self.text else value[: self.text] + _CUT
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, (TensorRef, np.ndarray)):
            dtype = value.element.name if isinstance(value, TensorRef) else str(value.dtype)
            return f"{dtype} [{', '.join(map(str, value.shape))}]"
        if is_dtype(value):
            return str(value)
        if isinstance(value, (bytes, bytearray)):
            return f"<{len(value)} bytes>"
        return repr(value) if isinstance(value, (Symbol, complex, range)) else f"<{type(value).__name__}>"


def _held(value: Any) -> Any:
    """What a configuration object stands for, through as many wrappers as it has; anything else as it is."""
    for _ in range(64):
        name = next((name for name in _HELD_IN if isinstance(value, Record) and name in value.fields), None)
        if name is None:
            break
        value = value[name]
    return value
