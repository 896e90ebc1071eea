"""Where stored tensors lie in the tensors of a running model: transformers' load operations, followed on shapes alone.

transformers stacks, joins, splits and transposes tensors while it loads (per-expert matrices become one stack, say).
Each of these moves blocks and changes no value, so a tensor of the model is a set of blocks of stored ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A block of the stored tensor `stored`, and where it lies in a tensor of the model.

    source: first and last (excluded) index along each axis of the stored tensor. axes: for each axis of the model's
    tensor the stored one's; None where the block is one entry of a stack. start: the block's first index there.
    """

    stored: str
    source: tuple[Bounds, ...]
    axes: tuple[int | None, ...]
    start: tuple[int, ...]

    def extent(self, axis: int) -> int:
        """The block's size along an axis of the model's tensor."""
        of = self.axes[axis]
        return 1 if of is None else self.source[of][1] - self.source[of][0]


@dataclass(frozen=True)
class Assembled:
    """A tensor made of blocks of stored tensors."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Assembled:
        """The stored tensor `name` as it is."""
        piece = Piece(name, tuple((0, size) for size in shape), tuple(range(len(shape))), (0,) * len(shape))
        return cls(tuple(shape), (piece,))


def stacked(tensors: Sequence[Assembled], dim: int) -> Assembled:
    """Tensors of one shape as entries along a new axis."""
    first = tensors[0].shape
    dim = dim % (len(first) + 1)
    pieces = [
        replace(
            piece,
            axes=(*piece.axes[:dim], None, *piece.axes[dim:]),
            start=(*piece.start[:dim], place, *piece.start[dim:]),
        )
        for place, tensor in enumerate(tensors)
        for piece in tensor.pieces
    ]
    return Assembled((*first[:dim], len(tensors), *first[dim:]), tuple(pieces))


def joined(tensors: Sequence[Assembled], dim: int) -> Assembled:
    """Tensors one after the other along an axis."""
    first = tensors[0].shape
    dim = dim % len(first)
    offsets = [0, *accumulate(tensor.shape[dim] for tensor in tensors)]
    pieces = [
        replace(piece, start=tuple(s + (offset if axis == dim else 0) for axis, s in enumerate(piece.start)))
        for tensor, offset in zip(tensors, offsets)
        for piece in tensor.pieces
    ]
    return Assembled((*first[:dim], offsets[-1], *first[dim + 1 :]), tuple(pieces))


def cut(tensor: Assembled, dim: int, sizes: Sequence[int]) -> list[Assembled]:
    """A tensor in parts of `sizes` along an axis."""
    dim = dim % len(tensor.shape)
    found = []
    begin = 0
    for size in sizes:
        pieces = [part for piece in tensor.pieces if (part := _narrowed(piece, dim, begin, begin + size)) is not None]
        found.append(Assembled((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), tuple(pieces)))
        begin += size
    return found


def _narrowed(piece: Piece, dim: int, begin: int, end: int) -> Piece | None:
    """The block's part between two indices of an axis, counted from the first of these."""
    first, last = max(piece.start[dim], begin), min(piece.start[dim] + piece.extent(dim), end)
    if first >= last:
        return None
    source = list(piece.source)
    of = piece.axes[dim]
    if of is not None:
        offset = source[of][0] - piece.start[dim]
        source[of] = (first + offset, last + offset)
    start = tuple(first - begin if axis == dim else value for axis, value in enumerate(piece.start))
    return replace(piece, source=tuple(source), start=start)


def transposed(tensor: Assembled, first: int, second: int) -> Assembled:
    """Two axes exchanged."""
    order = list(range(len(tensor.shape)))
    order[first], order[second] = order[second], order[first]
    pieces = [
        replace(piece, axes=tuple(piece.axes[i] for i in order), start=tuple(piece.start[i] for i in order))
        for piece in tensor.pieces
    ]
    return Assembled(tuple(tensor.shape[i] for i in order), tuple(pieces))


Collected = dict[str, list[Assembled]]


@dataclass(frozen=True)
class Converting:
    """One use of a converter of transformers': its patterns, and the model's tensor that it makes first."""

    sources: Sequence[str]
    targets: Sequence[str]
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig


def follow(operation: Any, collected: Collected, use: Converting) -> Collected | None:
    """What transformers' `operation` makes of collected tensors; None for one that is more than moving blocks."""
    step = _STEPS.get(type(operation).__name__)
    return None if step is None else step(operation, collected, use)


def _merge_list(operation: Any, collected: Collected, use: Converting) -> Collected:
    # Alone it makes the target; before another operation each list keeps its source's name.
    return {
        use.targets[0] if len(collected) == 1 else source: [stacked(tensors, operation.dim)]
        for source, tensors in collected.items()
    }


def _concatenate(operation: Any, collected: Collected, use: Converting) -> Collected:
    tensors = [tensor for source in use.sources for tensor in collected.get(source, ())]
    tensors = tensors or [tensor for found in collected.values() for tensor in found]
    return {use.targets[0]: [joined(tensors, operation.dim)]}


def _chunk(operation: Any, collected: Collected, use: Converting) -> Collected:
    tensor = next(iter(collected.values()))[0]
    targets = operation.get_target_patterns(list(use.targets), config=use.config)
    size = -(-tensor.shape[operation.dim] // len(targets))
    sizes = [max(0, min(size, tensor.shape[operation.dim] - size * place)) for place in range(len(targets))]
    return {target: [part] for target, part in zip(targets, cut(tensor, operation.dim, sizes))}


def _split(operation: Any, collected: Collected, use: Converting) -> Collected:
    tensor = next(iter(collected.values()))[0]
    names = [use.name.replace(use.targets[0], target) for target in use.targets]
    sizes = [use.shapes[name][operation.dim] for name in names]
    return {target: [part] for target, part in zip(use.targets, cut(tensor, operation.dim, sizes))}


def _transpose(operation: Any, collected: Collected, use: Converting) -> Collected:
    source, tensors = next(iter(collected.items()))
    target = use.targets[0] if len(use.targets) == 1 else source
    if operation.check_dims and tensors[0].shape == use.shapes[use.name]:
        return {target: tensors[:1]}
    return {target: [transposed(tensors[0], operation.dim0, operation.dim1)]}


_STEPS: Mapping[str, Callable[[Any, Collected, Converting], Collected]] = {
    "MergeModulelist": _merge_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
}
