"""One tensor of the merged model: the base's, and what adapters do to it, computed chunk by chunk with one
rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from weightport.adapters.arithmetic import arithmetic_dtype
from weightport.adapters.merging.low_rank_delta import Change, matrix_shape
from weightport.adapters.merging.quantized import nf4_round_trip
from weightport.adapters.reading.lora_tensors import is_finite
from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import chunks
from weightport.errors import NonFiniteError

CHUNK_ELEMENTS = 1 << 18
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
    `rows` then replaces single rows: index and value; `changes` builds what is added, in the dtype of the arithmetic.
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

    def add(self, before: torch.Tensor, change: torch.Tensor) -> float:
        """Count a block: the base's values and what was added to them, contiguous, of one shape and dtype. Returns
        what no sum of the two is larger than; infinite or NaN where that is not known."""
        if not before.numel():
            return 0.0
        base, added = before.reshape(-1), change.reshape(-1)
        squares = float(torch.dot(base, base)), float(torch.dot(added, added))
        self.base += squares[0]
        self.change += squares[1]
        # numpy's are faster than torch's, and twice over the block faster than torch.aminmax.
        values = added.numpy()
        self.largest = max(self.largest, -float(values.min()), float(values.max()))
        return math.sqrt(squares[0]) + math.sqrt(squares[1])


@dataclass(frozen=True)
class _Blocks:
    """Memory for one block of rows, used again for every block: fresh memory costs more than the arithmetic."""

    values: torch.Tensor
    added: torch.Tensor
    rounded: torch.Tensor

    @classmethod
    def of(cls, rows: int, columns: int, wide: torch.dtype, output: torch.dtype) -> _Blocks:
        shape = (rows, columns)
        return cls(torch.empty(shape, dtype=wide), torch.empty(shape, dtype=wide), torch.empty(shape, dtype=output))

    def first(self, rows: int) -> _Blocks:
        """The first `rows` of each."""
        return _Blocks(self.values[:rows], self.added[:rows], self.rounded[:rows])


def edited_chunks(output: Output, norms: Norms) -> Iterator[torch.Tensor]:
    """The tensor's values in its dtype, in flat chunks of whole rows. Raises NonFiniteError.

    A chunk is valid until the next one is asked for.
    """
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
    changes = tuple(edit.changes(wide))
    step = min(rows, max(1, CHUNK_ELEMENTS // max(columns, 1)))
    blocks = _Blocks.of(step, columns, wide, output.dtype)
    if changes and edit.replacement is None and not (edit.quantized or edit.dora or edit.rows):
        yield from _summed(output, norms, changes, blocks)
        return
    source = origin.read()
    if edit.quantized:
        source = nf4_round_trip(source, double=edit.quantized == "nf4-double", flipped=edit.flipped)
    source = source.reshape(rows, columns)
    before = source
    if edit.replacement is not None or edit.quantized:
        norms.comparable = output.base.shape == origin.shape
        before = output.base.read().reshape(rows, columns) if norms.comparable else source
    magnitude = edit.dora.magnitude.read().to(wide).reshape(-1) if edit.dora else None
    factor = None
    if magnitude is not None and edit.dora is not None and edit.dora.by_column:
        factor = magnitude / _column_norms(source, changes, blocks)
    for start in range(0, rows, max(step, 1)):
        stop = min(start + step, rows)
        block = blocks.first(stop - start)
        block.values.copy_(source[start:stop])
        for indices, replaced in edit.rows:
            for place, index in enumerate(indices):
                if start <= index < stop:
                    block.values[index - start] = replaced.read()[place].to(wide)
        if changes:
            _add_up(changes, start, stop, block.added)
            block.values.add_(block.added)
        if factor is not None:
            block.values.mul_(factor)
        elif magnitude is not None:
            lengths = torch.linalg.vector_norm(block.values, dim=1)
            block.values.mul_((magnitude[start:stop] / lengths).unsqueeze(1))
        unchanged = before[start:stop].to(wide)
        norms.add(unchanged, torch.sub(block.values, unchanged, out=block.added))
        yield _rounded(block, output, math.inf)


def _summed(output: Output, norms: Norms, changes: Sequence[Change], blocks: _Blocks) -> Iterator[torch.Tensor]:
    """The chunks of base + changes. The base is read as it is needed: its values are in the processor's cache then."""
    step, columns = blocks.values.shape
    start = 0
    for piece in output.base.pieces(max(step * columns, 1) * output.base.dtype.itemsize):
        values = piece.reshape(-1, columns)
        stop = start + values.shape[0]
        block = blocks.first(stop - start)
        block.values.copy_(values)
        _add_up(changes, start, stop, block.added)
        largest = norms.add(block.values, block.added)
        block.values.add_(block.added)
        yield _rounded(block, output, largest)
        start = stop


def _add_up(changes: Sequence[Change], start: int, stop: int, out: torch.Tensor) -> None:
    """Put the sum of the changes' rows into `out`."""
    changes[0].rows(start, stop, out)
    for change in changes[1:]:
        further = torch.empty_like(out)
        change.rows(start, stop, further)
        out.add_(further)


def _column_norms(source: torch.Tensor, changes: Sequence[Change], blocks: _Blocks) -> torch.Tensor:
    """The length of each column of source + changes."""
    total = torch.zeros(source.shape[1], dtype=torch.float64)
    step = blocks.values.shape[0]
    for start in range(0, source.shape[0], step):
        stop = min(start + step, source.shape[0])
        block = blocks.first(stop - start)
        block.values.copy_(source[start:stop])
        if changes:
            _add_up(changes, start, stop, block.added)
            block.values.add_(block.added)
        total += block.values.double().square().sum(0)
    return total.sqrt().to(blocks.values.dtype)


def _rounded(block: _Blocks, output: Output, largest: float) -> torch.Tensor:
    """The block's values in the output's dtype, flat. `largest`: what none is larger than, where that is known. Raises
    NonFiniteError."""
    block.rounded.copy_(block.values)
    # Half, for the rounding of what `largest` was computed from; not where it is NaN.
    if not largest < torch.finfo(output.dtype).max / 2 and not is_finite(block.rounded):
        if not is_finite(block.values):
            raise NonFiniteError(
                f"{output.name}: the merged weight would hold NaN or infinity. Check the base and the adapter: both "
                "should be of a training that did not diverge."
            )
        raise NonFiniteError(
            f"{output.name}: the merged weight reaches {float(block.values.abs().max()):.3g}, more than "
            f"{output.dtype} holds. Merge with --dtype bfloat16 or float32."
        )
    return block.rounded.reshape(-1)
