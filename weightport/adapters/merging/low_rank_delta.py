"""What an adapter adds to a weight, as rows of a matrix that are computed when they are needed.

A weight [rows, …] is seen as the matrix [rows, columns]. Linear weights are [out, in], so the change is B·A; the
weights of GPT-2's Conv1D [in, out] and of embeddings [rows, dim] are the other way round, so there it is (B·A)ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from weightport.adapters.reading.lora_tensors import ModuleAdapter
from weightport.converters.stored_pieces import Piece


class Change(Protocol):
    """Something added to a weight."""

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Put rows `start` to `stop` of what is added into `out`: [stop - start, columns], in the dtype of the
        arithmetic."""


@dataclass(frozen=True)
class LowRank:
    """left [rows, k] · right [k, columns]."""

    left: torch.Tensor
    right: torch.Tensor

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        torch.mm(self.left[start:stop], self.right, out=out)


@dataclass(frozen=True)
class OfExperts:
    """left [experts, x, r] · right [experts, r, y], for a weight [experts, x, y] seen as [experts · x, y]."""

    left: torch.Tensor
    right: torch.Tensor

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        height = self.left.shape[1]
        for expert in range(start // height, -(-stop // height)):
            above = expert * height
            first, last = max(start, above), min(stop, above + height)
            part = self.left[expert, first - above : last - above]
            torch.mm(part, self.right[expert], out=out[first - start : last - start])


@dataclass(frozen=True)
class Vector:
    """Values [rows], for a bias."""

    values: torch.Tensor

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self.values[start:stop].unsqueeze(1))


@dataclass(frozen=True)
class Dense:
    """Values [rows, columns] that are there already."""

    values: torch.Tensor

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self.values[start:stop])


@dataclass(frozen=True)
class Within:
    """A change of some rows and columns of the weight; nothing is added to the others."""

    change: Change
    rows_at: tuple[int, int]
    columns_at: tuple[int, int]

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.zero_()
        first, last = max(start, self.rows_at[0]), min(stop, self.rows_at[1])
        if first < last:
            inner = torch.empty(last - first, self.columns_at[1] - self.columns_at[0], dtype=out.dtype)
            self.change.rows(first - self.rows_at[0], last - self.rows_at[0], inner)
            out[first - start : last - start, slice(*self.columns_at)] = inner


@dataclass(frozen=True)
class Pair:
    """The two matrices of one module, before any scaling: a [r, in], b [out, r]. `flipped`: the weight is [in,
    out]."""

    a: torch.Tensor
    b: torch.Tensor
    flipped: bool

    def low_rank(self, scale: float) -> LowRank:
        """scale · B·A, in the weight's own orientation."""
        return LowRank(self.a.T, self.b.T * scale) if self.flipped else LowRank(self.b * scale, self.a)


def stored_part(change: Change, piece: Piece, shape: Sequence[int]) -> Change:
    """What the change of a tensor of the model adds to the stored tensor of `shape` that `piece` is a block of."""
    spans = [slice(start, start + piece.extent(axis)) for axis, start in enumerate(piece.start)]
    if isinstance(change, Vector):
        return _within(Vector(change.values[spans[0]]), piece, shape)
    if isinstance(change, Dense):
        block = change.values[spans[0], spans[1] if len(spans) == 2 else slice(None)]
        return _within(Dense(block.T if piece.axes == (1, 0) else block), piece, shape)
    if isinstance(change, OfExperts):
        left, right = change.left[spans[0], spans[1]], change.right[spans[0], :, spans[2]]
        if piece.axes[0] is not None:
            turned = piece.axes[1] > piece.axes[2]  # type: ignore[operator]
            return OfExperts(right.mT, left.mT) if turned else OfExperts(left, right)
        change, axes = LowRank(left[0], right[0]), piece.axes[1:]
    else:
        assert isinstance(change, LowRank)
        columns = spans[1] if len(spans) == 2 else slice(None)
        change, axes = LowRank(change.left[spans[0]], change.right[:, columns]), piece.axes
    if len(axes) == 2 and axes == (1, 0):
        change = LowRank(change.right.T, change.left.T)
    return _within(change, piece, shape)


def _within(change: Change, piece: Piece, shape: Sequence[int]) -> Change:
    if all(span == (0, size) for span, size in zip(piece.source, shape)):
        return change
    _, columns = matrix_shape(shape)
    return Within(change, piece.source[0], piece.source[1] if len(shape) == 2 else (0, columns))


def matrix_shape(shape: Sequence[int], *, stacked: bool = False) -> tuple[int, int]:
    """[rows, columns] of a weight seen as a matrix; a vector is one column, a stack of matrices one matrix of all
    rows."""
    if stacked:
        return prod(shape[:-1]), shape[-1]
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


# Classes whose linear layers are transformers' Conv1D, with weights [in, out], and the names of these layers.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def pair_shapes(module: ModuleAdapter) -> list[tuple[int, ...]]:
    """The shapes that a weight may have for the module's pair to be added to it."""
    a, b = module.a.shape, module.b.shape
    if module.embedding:
        return [(a[1], b[0])]
    if len(a) > 2:
        return [(b[0], *a[1:])]
    return [(b[0], a[1]), (a[1], b[0])]


def misfit(module: ModuleAdapter, shape: tuple[int, ...]) -> str | None:
    """Why the pair of `module` cannot be added to a weight of `shape`; None when it can."""
    if shape not in pair_shapes(module) or module.a.shape[0] != module.b.shape[1]:
        return _misfit(module, shape)
    if any(size != 1 for size in module.b.shape[2:]):
        return f"{module.b.name} {list(module.b.shape)} should be a 1 × 1 convolution"
    return None


def is_flipped(
    module: ModuleAdapter, shape: tuple[int, ...], *, fan_in_fan_out: bool, model_type: str, turned: bool | None = None
) -> bool:
    """Whether a weight of `shape` is [in, out] beside the pair of `module`, which fits it. `turned`: what the running
    model says of it, where that is known."""
    if module.embedding or shape != (module.b.shape[0], *module.a.shape[1:]):
        return True
    if len(shape) != 2 or shape[0] != shape[1]:
        return False
    # A square weight does not show which way round it is.
    if turned is not None:
        return turned
    return is_conv1d(module.module, model_type) if model_type in CONV1D_MODELS else fan_in_fan_out


def is_conv1d(module: str, model_type: str) -> bool:
    """Whether `module` is one of GPT-2's Conv1D layers, whose weights are [in, out]."""
    return model_type in CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_LAYERS


def read_pair(module: ModuleAdapter, dtype: torch.dtype, *, flipped: bool) -> Pair:
    """The pair of `module` in `dtype`, kernels flattened."""
    return Pair(module.a.read().to(dtype).flatten(1), module.b.read().to(dtype).flatten(1), flipped)


def _misfit(module: ModuleAdapter, shape: tuple[int, ...]) -> str:
    a, b = module.a.shape, module.b.shape
    wanted = list(pair_shapes(module)[0])
    if a[0] != b[1] or (len(shape) > 2 and len(a) == len(shape) and shape[1] != a[1] and b[0] == shape[0]):
        return (
            f"{module.module}: the pair is a dense convolution {wanted} beside one in groups {list(shape)}; there is "
            "no weight that it could be added to"
        )
    return f"{module.module}: the pair is for a weight {wanted}, the base's is {list(shape)}: another base"


def parameter_change(
    module: ModuleAdapter, shape: tuple[int, ...], rank: int, scale: float, dtype: torch.dtype, *, turned: bool
) -> Change:
    """The change of a parameter itself (target_parameters) of `shape`: [out, in], or [experts, …].

    peft stores r · experts rows of A, experts slowest, and as many columns of B, experts fastest. The pair fits
    (parameter_misfit). turned: a stack of matrices [in, out].
    """
    inputs, outputs = module.a.shape[1], module.b.shape[0]
    a, b = module.a.read().to(dtype), module.b.read().to(dtype) * scale
    if len(shape) == 2:
        return LowRank(b, a)
    experts = shape[0]
    transposed = turned if inputs == outputs else shape[1:] == (inputs, outputs)
    a = a.reshape(experts, rank, inputs)
    b = b.reshape(outputs, rank, experts).permute(2, 0, 1)
    return OfExperts(a.transpose(1, 2), b.transpose(1, 2)) if transposed else OfExperts(b, a)


def parameter_misfit(module: ModuleAdapter, key: str, shape: tuple[int, ...], rank: int) -> str | None:
    """Why the pair of `module` cannot be added to the parameter `key` of `shape`; None when it can."""
    if len(module.a.shape) != 2 or len(shape) not in (2, 3):
        return f"{key} {list(shape)}: pairs go with parameters of two or three axes"
    inputs, outputs = module.a.shape[1], module.b.shape[0]
    experts = shape[0] if len(shape) == 3 else 1
    fits = shape == (outputs, inputs) if len(shape) == 2 else sorted(shape[1:]) == sorted((inputs, outputs))
    if not fits:
        return f"{key}: the pair is for {outputs} × {inputs}, the base's is {list(shape)}: another base"
    if module.a.shape[0] != rank * experts:
        return (
            f"{module.a.name} has {module.a.shape[0]} rows, but r and rank_pattern say {rank} for {key} and each of "
            f"{experts}: the two files are of different trainings"
        )
    return None
