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

from weightport.adapters.lora_tensors import ModuleAdapter


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
class Pair:
    """The two matrices of one module, before any scaling: a [r, in], b [out, r]. `flipped`: the weight is [in,
    out]."""

    a: torch.Tensor
    b: torch.Tensor
    flipped: bool

    def low_rank(self, scale: float) -> LowRank:
        """scale · B·A, in the weight's own orientation."""
        return LowRank(self.a.T, self.b.T * scale) if self.flipped else LowRank(self.b * scale, self.a)


def matrix_shape(shape: Sequence[int], *, stacked: bool = False) -> tuple[int, int]:
    """[rows, columns] of a weight seen as a matrix; a vector is one column, a stack of matrices one matrix of all
    rows."""
    if stacked:
        return prod(shape[:-1]), shape[-1]
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


# Classes whose linear layers are transformers' Conv1D, with weights [in, out], and the names of these layers.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
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
    if shape not in pair_shapes(module):
        return _misfit(module, shape)
    if any(size != 1 for size in module.b.shape[2:]):
        return f"{module.b.name} {list(module.b.shape)} should be a 1 × 1 convolution"
    return None


def is_flipped(module: ModuleAdapter, shape: tuple[int, ...], *, fan_in_fan_out: bool, model_type: str) -> bool:
    """Whether a weight of `shape` is [in, out] beside the pair of `module`, which fits it."""
    if module.embedding or shape != (module.b.shape[0], *module.a.shape[1:]):
        return True
    if len(shape) != 2 or shape[0] != shape[1]:
        return False
    # A square weight does not show which way round it is.
    return is_conv1d(module.module, model_type) if model_type in _CONV1D_MODELS else fan_in_fan_out


def is_conv1d(module: str, model_type: str) -> bool:
    """Whether `module` is one of GPT-2's Conv1D layers, whose weights are [in, out]."""
    return model_type in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_LAYERS


def read_pair(module: ModuleAdapter, dtype: torch.dtype, *, flipped: bool) -> Pair:
    """The pair of `module` in `dtype`, kernels flattened."""
    return Pair(module.a.read().to(dtype).flatten(1), module.b.read().to(dtype).flatten(1), flipped)


def _misfit(module: ModuleAdapter, shape: tuple[int, ...]) -> str:
    a, b = module.a.shape, module.b.shape
    wanted = list(pair_shapes(module)[0])
    if len(shape) > 2 and len(a) == len(shape) and shape[1] != a[1] and b[0] == shape[0]:
        return (
            f"{module.module}: the pair is a dense convolution {wanted} beside one in groups {list(shape)}; there is "
            "no weight that it could be added to"
        )
    return f"{module.module}: the pair is for a weight {wanted}, the base's is {list(shape)}: another base"


_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text"})


def parameter_change(
    module: ModuleAdapter, shape: tuple[int, ...], rank: int, scale: float, dtype: torch.dtype, model_type: str
) -> Change | None:
    """The change of a parameter itself (target_parameters): [out, in], or [experts, …]; None when it does not fit.

    peft stores r · experts rows of A, experts slowest, and as many columns of B, experts fastest.
    """
    if len(module.a.shape) != 2 or len(shape) not in (2, 3):
        return None
    inputs, outputs = module.a.shape[1], module.b.shape[0]
    if len(shape) == 2:
        fits = shape == (outputs, inputs) and module.a.shape[0] == rank
        return LowRank(module.b.read().to(dtype) * scale, module.a.read().to(dtype)) if fits else None
    experts = shape[0]
    if module.a.shape[0] != rank * experts or sorted(shape[1:]) != sorted((inputs, outputs)):
        return None
    transposed = model_type in _TRANSPOSED_EXPERTS if inputs == outputs else shape[1:] == (inputs, outputs)
    a = module.a.read().to(dtype).reshape(experts, rank, inputs)
    b = module.b.read().to(dtype).reshape(outputs, rank, experts).permute(2, 0, 1) * scale
    return OfExperts(a.transpose(1, 2), b.transpose(1, 2)) if transposed else OfExperts(b, a)
