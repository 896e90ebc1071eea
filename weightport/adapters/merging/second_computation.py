"""What a merged tensor should hold: base + scaling · B·A, computed a second time.

Shares no arithmetic with the merge: neither its scaling nor its changes, edits and combinations. A tensor is seen as a
matrix [rows, columns], and each pair as low-rank patches of it, so that any rectangle can be computed alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from weightport.adapters.merging.additive_check import ExpectedDelta
from weightport.adapters.merging.lora_targets import PairChange, Touched
from weightport.adapters.merging.tensor_edit import Output
from weightport.checkpoints import TensorRef
from weightport.checkpoints.layout import Span, StoredTensor

BLOCK_ELEMENTS = 1 << 19
"""Elements compared at a time: few enough for the processor's cache, and enough to be worth a call."""


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a tensor seen as a matrix, each from the first to the last (excluded)."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def covering(self, columns: int, first: int, last: int) -> slice:
        """Where the elements `first` to `last` of the matrix, counted row by row, lie in this rectangle."""
        start = self.rows[0] * columns + self.columns[0]
        return slice(first - start, last - start)


def rectangles(columns: int, first: int, last: int) -> Iterator[tuple[Rectangle, int, int]]:
    """The elements `first` to `last` of a matrix of `columns`, in parts of about BLOCK_ELEMENTS: (a rectangle around
    the part, its first element, its last)."""
    while first < last:
        row = first // columns
        if columns > BLOCK_ELEMENTS:
            until = min(last, first + BLOCK_ELEMENTS, (row + 1) * columns)
            found = Rectangle((row, row + 1), (first - row * columns, until - row * columns))
        else:
            until = min(last, (row + BLOCK_ELEMENTS // columns) * columns)
            found = Rectangle((row, -(-until // columns)), (0, columns))
        yield found, first, until
        first = until


@dataclass(frozen=True)
class Patch:
    """left [m, r] · right [r, n], float64, added to a matrix from (`row`, `column`) on."""

    row: int
    column: int
    left: torch.Tensor
    right: torch.Tensor

    def factors(self, place: Rectangle, dtype: torch.dtype) -> tuple[Rectangle, torch.Tensor, torch.Tensor] | None:
        """(what of `place` it adds to, the two factors of that in `dtype`); None where it adds nothing."""
        (height, rank), width = self.left.shape, self.right.shape[1]
        top, bottom = max(place.rows[0], self.row), min(place.rows[1], self.row + height)
        start, end = max(place.columns[0], self.column), min(place.columns[1], self.column + width)
        if top >= bottom or start >= end or not rank:
            return None
        left, right = (self.left, self.right) if dtype == torch.float64 else self._narrow
        return (
            Rectangle(
                (top - place.rows[0], bottom - place.rows[0]), (start - place.columns[0], end - place.columns[0])
            ),
            left[top - self.row : bottom - self.row],
            right[:, start - self.column : end - self.column],
        )

    @cached_property
    def _narrow(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left.float(), self.right.float()

    @cached_property
    def _lengths(self) -> tuple[NDArray[np.float64], float]:
        """The length of each row of `left`, and of the longest column of `right`."""
        return self.left.norm(dim=1).numpy(), float(self.right.norm(dim=0).max())

    def reach(self, place: Rectangle) -> float:
        """At least the sum of |left| · |right| of any element of `place` (Cauchy and Schwarz)."""
        rows, longest = self._lengths
        found = rows[max(place.rows[0] - self.row, 0) : max(place.rows[1] - self.row, 0)]
        return float(found.max()) * longest if found.size else 0.0

    def at(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What is added to single elements, float64 like their number."""
        rows, columns = rows - self.row, columns - self.column
        within = (rows >= 0) & (rows < self.left.shape[0]) & (columns >= 0) & (columns < self.right.shape[1])
        rows, columns = rows.where(within, 0), columns.where(within, 0)
        return (self.left[rows] * self.right[:, columns].T).sum(1).where(within, 0.0)


class UnknownOrderError(Exception):
    """The stored values lie in an order that patches cannot state."""


class SecondComputation:
    """One changed tensor, computed again from base and adapters. Raises UnknownOrderError."""

    def __init__(
        self, out: Output, touched: Touched, settings: Sequence[Mapping[str, Any]], weights: Sequence[float]
    ) -> None:
        assert out.edit is not None
        self.base = _Elements(out.edit.replacement or out.base)
        changes = [*touched.pairs, *touched.parameters, *touched.biases]
        stacked = any(_stacked(change, out.shape) for change in changes)
        self.columns = max((out.shape[-1] if stacked else prod(out.shape[1:])) if out.shape else 1, 1)
        self.patches = tuple(
            patch
            for change in changes
            for patch in _patches(change, settings[change.adapter], weights[change.adapter], out.shape)
        )
        # What other methods add is no product of two narrow matrices: it is held as a whole.
        self.dense = tuple(
            ExpectedDelta(each, settings[each.adapter], weights[each.adapter], out.shape, self.base.ref)
            for each in touched.deltas
        )
        self.tokens = {
            row: values for _, ref, rows in touched.tokens for row, values in zip(rows, ref.read().double().unbind())
        }
        self.lengths = self._dora(out, touched)

    @cached_property
    def depth(self) -> int:
        """Products added up in an element, at most."""
        return sum(patch.left.shape[1] + 1 for patch in self.patches)

    def reach(self, place: Rectangle) -> float:
        """At least the sum of the absolute values of what is added to any element of `place`."""
        return sum(patch.reach(place) for patch in self.patches)

    def base_values(self, place: Rectangle) -> torch.Tensor:
        """The base's values there, [rows, columns], as they are stored; valid until others are asked for."""
        first = place.rows[0] * self.columns + place.columns[0]
        return self.base.run(first, first + prod(place.shape)).reshape(place.shape)

    def added(self, place: Rectangle, out: torch.Tensor) -> torch.Tensor:
        """What is added there, put into `out` [rows, columns] in its dtype, float32 or float64."""
        found = [factors for patch in self.patches if (factors := patch.factors(place, out.dtype)) is not None]
        whole = bool(found) and found[0][0].shape == place.shape
        if whole:
            torch.mm(found[0][1], found[0][2], out=out)
        else:
            out.zero_()
        for where, left, right in found[whole:]:
            out[slice(*where.rows), slice(*where.columns)].addmm_(left, right)
        for delta in self.dense:
            out += delta.matrix(self.columns)[slice(*place.rows), slice(*place.columns)]
        return out

    def add_to(self, place: Rectangle, sums: torch.Tensor) -> None:
        """Add to `sums` [rows, columns], float32 or float64, what patches add there."""
        for patch in self.patches:
            if (factors := patch.factors(place, sums.dtype)) is not None:
                where, left, right = factors
                part = sums if where.shape == place.shape else sums[slice(*where.rows), slice(*where.columns)]
                part.addmm_(left, right)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """What is added to single elements, counted row by row: float64."""
        rows, columns = places // self.columns, places % self.columns
        total = torch.zeros(places.numel(), dtype=torch.float64)
        for patch in self.patches:
            total += patch.at(rows, columns)
        return total

    def finish(self, place: Rectangle, sums: torch.Tensor) -> torch.Tensor:
        """Of base + added in float64, what DoRA makes of it."""
        if self.lengths is not None:
            by_row, factor = self.lengths
            sums = sums * (factor[slice(*place.rows)].unsqueeze(1) if by_row else factor[slice(*place.columns)])
        return sums

    def with_trained_rows(self, place: Rectangle, base: torch.Tensor) -> torch.Tensor:
        """`base` with the rows that were trained one by one in it. Pairs are added to these too: of a tied head peft
        trains the rows below the pair."""
        for row, values in self.tokens.items():
            if place.rows[0] <= row < place.rows[1]:
                base[row - place.rows[0]] = values[slice(*place.columns)]
        return base

    def only_adds(self, place: Rectangle) -> bool:
        """Whether what stands there is base + patches, which `reach` and `at` know."""
        trained = any(place.rows[0] <= row < place.rows[1] for row in self.tokens)
        return self.lengths is None and not self.dense and not trained

    def _dora(self, out: Output, touched: Touched) -> tuple[bool, torch.Tensor] | None:
        """(by row or by column, what DoRA multiplies the sum with); None without DoRA."""
        magnitude = next((change.module.magnitude for change in touched.pairs if change.module.magnitude), None)
        if magnitude is None:
            return None
        count = prod(out.shape)
        by_row = torch.zeros(count // self.columns, dtype=torch.float64)
        by_column = torch.zeros(self.columns, dtype=torch.float64)
        for place, _, _ in rectangles(self.columns, 0, count):
            # A copy, of float64 too: what is held of the base is read again.
            squares = self.with_trained_rows(place, self.base_values(place).to(torch.float64, copy=True))
            squares.add_(self.added(place, torch.empty_like(squares))).square_()
            by_row[slice(*place.rows)] += squares.sum(1)
            by_column[slice(*place.columns)] += squares.sum(0)
        across = out.edit is not None and out.edit.dora is not None and out.edit.dora.by_column
        return not across, magnitude.read().double().reshape(-1) / (by_column if across else by_row).sqrt()


class _Elements:
    """Runs of a tensor's elements, in row-major order. Only what can be had in parts at the cost of the parts is read
    so; of the rest all is held."""

    def __init__(self, ref: TensorRef) -> None:
        self.ref = ref
        self.width = max(prod(ref.shape[1:]), 1)
        load = ref.load
        by_rows = isinstance(load, StoredTensor) and isinstance(load.source, Span) and load.layout.is_contiguous
        self._held = ((0, ref.numel), ref.read().reshape(-1)) if not by_rows or not ref.shape else None
        self._plain: tuple[Span, int] | None = None
        if by_rows and isinstance(load, StoredTensor) and isinstance(load.source, Span) and load.source.is_plain:
            self._plain = load.source, load.layout.offset
        self._memory = torch.empty(0, dtype=ref.dtype)

    def run(self, first: int, last: int) -> torch.Tensor:
        """Elements `first` to `last`, 1-D, in the tensor's own dtype; valid until others are asked for."""
        if self._held is None and self._plain is not None:
            return self._read(*self._plain, first, last)
        if self._held is None or not (self._held[0][0] <= first and last <= self._held[0][1]):
            rows = first // self.width, -(-last // self.width)
            values = self.ref.rows(*rows).reshape(-1)
            self._held = (rows[0] * self.width, rows[1] * self.width), values
        (start, _), values = self._held
        return values[first - start : last - start]

    def _read(self, source: Span, offset: int, first: int, last: int) -> torch.Tensor:
        """The same, read into memory that is used again."""
        if self._memory.numel() < last - first:
            self._memory = torch.empty(last - first, dtype=self.ref.dtype)
        values = self._memory[: last - first]
        source.fill(values, (offset + first) * values.itemsize)
        return values


def _stacked(change: PairChange, shape: Sequence[int]) -> bool:
    """Whether a change is of a stack of matrices, one for each expert, and the stored tensor such a stack too."""
    return _of_experts(change, shape) and len(shape) == 3


def _of_experts(change: PairChange, shape: Sequence[int]) -> bool:
    model = shape if change.part.plain else change.part.place.shape
    return change.key != change.module.module and len(model) == 3


def _patches(
    change: PairChange, settings: Mapping[str, Any], weight: float, shape: tuple[int, ...]
) -> Iterator[Patch]:
    """The change of a stored tensor of `shape`, as patches of its matrix."""
    matrices = _matrices(change, settings, weight, shape)
    if change.part.plain:
        height = shape[1] if _stacked(change, shape) else 0
        for number, (left, right) in enumerate(matrices):
            yield Patch(number * height, 0, left, right)
        return
    piece = change.part.piece
    spans = [slice(start, start + piece.extent(axis)) for axis, start in enumerate(piece.start)]
    axes, experts = piece.axes, (0, 1)
    if _of_experts(change, shape):
        if axes[0] not in (0, None):
            raise UnknownOrderError
        experts, axes, spans = (spans[0].start, spans[0].stop), axes[1:], spans[1:]
    across = slice(None)
    if len(spans) == 2:
        across = spans[1]
    elif axes != tuple(range(len(axes))) or any(span != (0, n) for span, n in zip(piece.source[1:], shape[1:])):
        raise UnknownOrderError
    turned = len(axes) == 2 and (axes[0] is None or (axes[1] is not None and axes[0] > axes[1]))
    # The last two axes of the stored tensor are those of the matrix; the one before counts experts.
    rows = piece.source[-2] if len(shape) >= 2 and len(spans) == 2 else piece.source[0]
    first_column = piece.source[-1][0] if len(shape) >= 2 and len(spans) == 2 else 0
    for number, (left, right) in enumerate(matrices[slice(*experts)]):
        left, right = left[spans[0]], right[:, across]
        if turned:
            left, right = right.T, left.T
        above = (piece.source[0][0] + number) * shape[1] if _stacked(change, shape) else 0
        yield Patch(above + rows[0], first_column, left, right)


def _matrices(
    change: PairChange, settings: Mapping[str, Any], weight: float, shape: tuple[int, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The change of the model's tensor as products left · right in float64, one for each expert, in the axes of the
    model's tensor."""
    module = change.module
    scale = _strength(settings, change.key) * weight * change.times
    model = shape if change.part.plain else change.part.place.shape
    if len(shape) == 1 and module.bias is not None:
        return [(module.bias.read().double().reshape(-1, 1) * scale, torch.ones(1, 1, dtype=torch.float64))]
    a, b = module.a.read().double().flatten(1), module.b.read().double().flatten(1) * scale
    pairs = [(b, a)]
    rows, columns = model[0], a.shape[1]
    experts = _of_experts(change, shape)
    if experts:
        rank = a.shape[0] // model[0]
        pairs = [(b[:, n :: model[0]], a[n * rank : (n + 1) * rank]) for n in range(model[0])]
        rows, columns = model[1], model[2]
    turned = module.embedding or (b.shape[0], a.shape[1]) != (rows, columns)
    if not turned and rows == columns:
        known = change.part.place.turned
        turned = bool(settings.get("fan_in_fan_out")) if known is None else known
        turned = turned and len(model) == (3 if experts else 2)
    if not module.embedding and len(model) > 2 and not experts:
        turned = False
    return [(right.T, left.T) if turned else (left, right) for left, right in pairs]


def _strength(settings: Mapping[str, Any], name: str) -> float:
    """alpha / r of the module or parameter `name`, as peft's documentation states it."""

    def of(field: str, otherwise: Any) -> float:
        patterns = settings.get(field) or {}
        return float(next((v for key, v in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", name)), otherwise))

    rank = of("rank_pattern", settings.get("r", 8))
    return of("alpha_pattern", settings.get("lora_alpha", 8)) / (rank**0.5 if settings.get("use_rslora") else rank)
