"""What part of a tensor a reference kept: strides, positions, or the first values, row-major.

In a reference file's `slices`, a tensor kept in part has one entry an axis (trailing axes may be left out: kept
whole):

    [start, stop]  [start, stop, step]      a range; `stop` null reaches to the end
    {"indices": [0, 1, 63]}                 these positions
    null                                    the whole axis

or, for all axes at once, `{"flat": [start, stop]}`: a range of the tensor's values in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from weightport.errors import ReferenceFileError

Axis = slice | tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """A part of a tensor; the default is all of it."""

    axes: tuple[Axis, ...] = ()
    flat: slice | None = None

    @property
    def given(self) -> bool:
        """Whether anything was left out: False for the whole tensor."""
        return bool(self.axes) or self.flat is not None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The selected part. Raises ReferenceFileError when it reaches outside `tensor`."""
        if self.flat is not None:
            return _take(tensor.reshape(-1), 0, self.flat)
        if len(self.axes) > tensor.ndim:
            raise ReferenceFileError(
                f"{len(self.axes)} axes are sliced, but the tensor {list(tensor.shape)} has fewer"
            )
        for dim, axis in enumerate(self.axes):
            tensor = _take(tensor, dim, axis)
        return tensor

    def fits(self, kept: tuple[int, ...]) -> bool:
        """Whether a tensor of shape `kept` can be this selection of some tensor."""
        if self.flat is not None:
            return len(kept) == 1 and _fits(self.flat, kept[0])
        return len(self.axes) <= len(kept) and all(_fits(axis, size) for axis, size in zip(self.axes, kept))


WHOLE = Selection()
_LARGEST_INDEX = 2**63 - 1
"""What torch takes: an int64."""


def parse_selection(data: Any) -> Selection:
    """A selection from its JSON form. Raises ValueError saying what is wrong with it."""
    if isinstance(data, dict):
        if set(data) != {"flat"}:
            raise ValueError(f'expected {{"flat": [start, stop]}}, found the keys {sorted(data)}')
        return Selection(flat=_parse_range(data["flat"]))
    if not isinstance(data, list):
        raise ValueError(f"expected a list with one entry an axis, found {data!r}")
    return Selection(tuple(_parse_axis(entry) for entry in data))


def selection_json(selection: Selection) -> Any:
    """The JSON form that `parse_selection` reads."""
    if selection.flat is not None:
        return {"flat": _range_json(selection.flat)}
    return [{"indices": list(axis)} if isinstance(axis, tuple) else _range_json(axis) for axis in selection.axes]


def _parse_axis(entry: Any) -> Axis:
    if entry is None:
        return slice(0, None, 1)
    if isinstance(entry, dict):
        indices = entry.get("indices")
        if set(entry) != {"indices"} or not isinstance(indices, list) or not all(_is_index(i) for i in indices):
            raise ValueError(f'expected {{"indices": [0, 1, …]}}, found {entry!r}')
        return tuple(indices)
    return _parse_range(entry)


def _parse_range(entry: Any) -> slice:
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        raise ValueError(f"expected [start, stop] or [start, stop, step], found {entry!r}")
    start, stop, step = entry[0], entry[1], entry[2] if len(entry) == 3 else 1
    if not (_is_index(start) and (stop is None or (_is_index(stop) and stop > start)) and _is_index(step) and step):
        raise ValueError(f"expected 0 ≤ start < stop and step ≥ 1, found {entry!r}")
    return slice(start, stop, step)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_INDEX


def _range_json(axis: slice) -> list[int | None]:
    return [axis.start, axis.stop] if axis.step == 1 else [axis.start, axis.stop, axis.step]


def _fits(axis: Axis, kept: int) -> bool:
    if isinstance(axis, tuple):
        return kept == len(axis)
    return axis.stop is None or kept == len(range(axis.start, axis.stop, axis.step))


def _take(tensor: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    size = tensor.shape[dim]
    last = max(axis, default=-1) if isinstance(axis, tuple) else axis.start if axis.stop is None else axis.stop - 1
    if last >= size:
        raise ReferenceFileError(f"axis {dim} was kept up to place {last}, but the model's has only {size}")
    if isinstance(axis, tuple):
        return tensor.index_select(dim, torch.tensor(axis, dtype=torch.int64, device=tensor.device))
    return tensor[(slice(None),) * dim + (axis,)]
