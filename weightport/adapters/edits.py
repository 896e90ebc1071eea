"""One tensor of the merged model: the base's, and what adapters do to it, computed chunk by chunk with one
rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoints import TensorRef
from ..converters.writing import chunks
from ..errors import NonFiniteError
from .changes import Change, matrix_shape
from .quantized import nf4_round_trip

CHUNK_ELEMENTS = 1 << 20
"""Elements that are worked on at a time: they stay in the processor's cache."""


@dataclass(frozen=True)
class Dora:
    """DoRA's magnitudes, one a row of the weight matrix (a column where the weight is [in, out]).

    `build` gives the change that belongs to them: the norms are those of weight + change.
    """

    magnitude: TensorRef
    by_column: bool


@dataclass(frozen=True)
class Edit:
    """What happens to one tensor of the base.

    `replacement` is taken instead of the base's values; `quantized` ("nf4", "nf4-double") rounds these first;
    `changes` builds what is added, in the dtype of the arithmetic; `rows` then replaces single rows: index and value.
    `stacked`: a matrix for each expert, [experts, rows, columns].
    """

    sources: tuple[str, ...]
    changes: Callable[[torch.dtype], Sequence[Change]] = lambda dtype: ()
    replacement: TensorRef | None = None
    dora: Dora | None = None
    rows: tuple[tuple[Sequence[int], TensorRef], ...] = ()
    quantized: str | None = None
    flipped: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Output:
    """A tensor to be written: of the base's, or a copy of one of them under another name, with or without an edit."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: TensorRef
    edit: Edit | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def copied(self) -> bool:
        """Whether the base's bytes are written as they are."""
        return self.edit is None and self.dtype == self.base.dtype


@dataclass
class Norms:
    """Sums of squares, added up while a tensor is written: of the change to the base's values, and of these."""

    change: float = 0.0
    base: float = 0.0
    largest: float = 0.0
    comparable: bool = field(default=True)

    def add(self, before: torch.Tensor, change: torch.Tensor) -> None:
        """Count a block: the base's values and what was added to them, of one shape and dtype."""
        if not before.numel():
            return
        self.change += float(torch.linalg.vector_norm(change)) ** 2
        self.base += float(torch.linalg.vector_norm(before)) ** 2
        low, high = torch.aminmax(change)
        self.largest = max(self.largest, -float(low), float(high))


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What products and sums are computed in, for operands and a result of `dtypes`: float32 for 16-bit weights,
    float64 for wider ones, so that the result is rounded once."""
    return torch.float64 if any(dtype.itemsize > 2 for dtype in dtypes) else torch.float32


def edited_chunks(output: Output, norms: Norms) -> Iterator[torch.Tensor]:
    """The tensor's values in its dtype, in flat chunks of whole rows. Raises NonFiniteError."""
    edit = output.edit or Edit(())
    origin = edit.replacement or output.base
    if not output.dtype.is_floating_point:
        # Counters of a module that was saved as a whole.
        before = output.base.read().double()
        norms.add(before, origin.read().double() - before)
        yield from chunks(origin.read(), output.dtype)
        return
    wide = arithmetic_dtype(output.base.dtype, output.dtype)
    rows, columns = matrix_shape(origin.shape, stacked=edit.stacked)
    source = origin.read()
    if edit.quantized:
        source = nf4_round_trip(source, double=edit.quantized == "nf4-double", flipped=edit.flipped)
    source = source.reshape(rows, columns)
    before = source
    if edit.replacement is not None or edit.quantized:
        norms.comparable = output.base.shape == origin.shape
        before = output.base.read().reshape(rows, columns) if norms.comparable else source
    changes = tuple(edit.changes(wide))
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    magnitude = edit.dora.magnitude.read().to(wide).reshape(-1) if edit.dora else None
    factor = None
    if magnitude is not None and edit.dora is not None and edit.dora.by_column:
        factor = magnitude / _column_norms(source, changes, step, wide)
    # What was added is known as it stands, unless the sum is changed again.
    only_added = bool(changes) and before is source and magnitude is None and not edit.rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if only_added:
            values = source[start:stop].to(wide, copy=True)
            added = _added(changes, start, stop)
            norms.add(values, added)
            values += added
            yield _rounded(values, output)
            continue
        values = _sum(source, changes, start, stop, wide)
        if factor is not None:
            values *= factor
        elif magnitude is not None:
            values *= (magnitude[start:stop] / torch.linalg.vector_norm(values, dim=1)).unsqueeze(1)
        for indices, replaced in edit.rows:
            for place, index in enumerate(indices):
                if start <= index < stop:
                    values[index - start] = replaced.read()[place].to(wide)
        unchanged = before[start:stop].to(wide)
        norms.add(unchanged, values - unchanged)
        yield _rounded(values, output)


def _sum(source: torch.Tensor, changes: Sequence[Change], start: int, stop: int, wide: torch.dtype) -> torch.Tensor:
    values = source[start:stop].to(wide, copy=True)
    if changes:
        values += _added(changes, start, stop)
    return values


def _added(changes: Sequence[Change], start: int, stop: int) -> torch.Tensor:
    added = changes[0].rows(start, stop)
    for change in changes[1:]:
        added += change.rows(start, stop)
    return added


def _column_norms(source: torch.Tensor, changes: Sequence[Change], step: int, wide: torch.dtype) -> torch.Tensor:
    total = torch.zeros(source.shape[1], dtype=torch.float64)
    for start in range(0, source.shape[0], step):
        values = _sum(source, changes, start, min(start + step, source.shape[0]), wide)
        total += values.double().square().sum(0)
    return total.sqrt().to(wide)


def _rounded(values: torch.Tensor, output: Output) -> torch.Tensor:
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise NonFiniteError(
            f"{output.name}: the merged weight would hold NaN or infinity. Check the base and the adapter: both "
            "should be of a training that did not diverge."
        )
    rounded = values.to(output.dtype)
    if largest > 0.99 * torch.finfo(output.dtype).max and not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(
            f"{output.name}: the merged weight reaches {largest:.3g}, more than {output.dtype} holds. "
            "Merge with --dtype bfloat16 or float32."
        )
    return rounded.reshape(-1)
