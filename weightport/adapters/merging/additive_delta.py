"""What adapters of methods other than LoRA add to a weight, each by the formula of its method's paper as peft 0.21
states it. Nothing is approximated: where peft would decompose the sum into a LoRA pair, the matrix itself is added.

A weight is seen as [out, in]; of a convolution [out, in · height · width]. Tensors may be on the meta device, where
only their shapes are checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightport.adapters.merging.low_rank_delta import CONV1D_MODELS, Change, Dense, LowRank, is_conv1d, stored_part
from weightport.adapters.reading.additive_tensors import ModuleDelta
from weightport.adapters.reading.lora_config import MergeSettings
from weightport.adapters.reading.lora_settings import is_number
from weightport.converters.lora_patterns import shown
from weightport.converters.stored_pieces import Piece
from weightport.errors import AdapterError

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ByRows:
    """A matrix [height, …] whose rows `of` computes: from the first to the last, excluded."""

    height: int
    of: Callable[[int, int], torch.Tensor]

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        values = self.of(start, stop)
        if values.shape != out.shape:
            raise ValueError(f"rows of {list(values.shape)}, not {list(out.shape)}")
        out.copy_(values)


@dataclass(frozen=True)
class Weight:
    """The weight that something is added to: its shape seen as [out, in], its kernel's, and what the settings say."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    settings: MergeSettings
    module: str

    def strength(self, alpha: str = "alpha", rank: float | None = None) -> float:
        """alpha / rank, by the settings' patterns."""
        return self.number(alpha, "alpha_pattern") / (rank or self.settings.rank(self.module))

    def number(self, field: str, patterns: str | None = None) -> float:
        """A number of the settings. Raises AdapterError for anything else."""
        value: Any = self.settings.patterned(patterns, self.module, None) if patterns else None
        value = self.settings.data.get(field) if value is None else value
        if not is_number(value):
            raise AdapterError(f"{self.settings.where}: {field} is {shown(value)}; expected a number.")
        return float(value)

    def count(self, field: str) -> int:
        """A whole number of the settings, at least 1. Raises AdapterError for anything else."""
        value = self.settings.data.get(field)
        if type(value) is not int or value < 1:
            raise AdapterError(f"{self.settings.where}: {field} is {shown(value)}; expected a number of at least 1.")
        return value


def _loha(parts: Parts, weight: Weight) -> Change:
    """FedPara (arXiv:2108.06098): the elementwise product of two matrices of low rank."""
    scale = weight.strength()
    names = [("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2")]
    factors = [_factor(parts, *each) for each in names]
    return ByRows(
        factors[0].height, lambda start, stop: factors[0].of(start, stop) * factors[1].of(start, stop) * scale
    )


def _factor(parts: Parts, first: str, second: str, core: str) -> ByRows:
    """first · second, or with a core [r, r, height, width] (Tucker's form) first and second along its axes."""
    a, b = parts[first], parts[second]
    if core not in parts:
        return ByRows(a.shape[0], lambda start, stop: a[start:stop] @ b)
    inner = torch.einsum("ijkl,jr->irkl", parts[core], b).flatten(1)
    return ByRows(a.shape[1], lambda start, stop: a[:, start:stop].T @ inner)


def _lokr(parts: Parts, weight: Weight) -> Change:
    """LoKr (arXiv:2309.14859): a Kronecker product, either factor as it is or of low rank."""
    left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        right = parts["lokr_w2"]
    else:
        factor = _factor(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        right = factor.of(0, factor.height)
    left = left * weight.strength()
    if right.ndim == 3:
        # peft lets torch align a kernel of one axis with the first factor's columns.
        whole = torch.kron(left, right).reshape(weight.outputs, -1)
        return ByRows(weight.outputs, lambda start, stop: whole[start:stop])
    right = right.flatten(1)
    height = right.shape[0]

    def rows(start: int, stop: int) -> torch.Tensor:
        index = torch.arange(start, stop, device=left.device)
        return (left[index // height].unsqueeze(2) * right[index % height].unsqueeze(1)).flatten(1)

    return ByRows(left.shape[0] * height, rows)


def _vera(parts: Parts, weight: Weight) -> Change:
    """VeRA (arXiv:2310.11454): two shared matrices, their rows scaled."""
    a, b = parts["vera_A"][:, : weight.inputs], parts["vera_B"][: weight.outputs]
    return LowRank(parts["vera_lambda_b"].unsqueeze(1) * b, parts["vera_lambda_d"].unsqueeze(1) * a)


def _miss(parts: Parts, weight: Weight) -> Change:
    """MiSS (arXiv:2409.15371): every rank-th input is added up, and the sums have one row of the block each."""
    block = parts["miss_block"]
    if block.ndim != 2 or weight.outputs % block.shape[1]:
        raise ValueError("the block is no matrix over the outputs")
    left = block.repeat(1, weight.outputs // block.shape[1]).T
    places = torch.arange(weight.inputs, device=block.device) % block.shape[0]
    right = (places == torch.arange(block.shape[0], device=block.device).unsqueeze(1)).to(block.dtype)
    return LowRank(left, right)


def _c3a(parts: Parts, weight: Weight) -> Change:
    """C³A (arXiv:2407.19342): blocks of a circulant matrix each, divided by the number of inputs."""
    kernel = parts["c3a_kernel"] / weight.inputs
    blocks_out, _, size = kernel.shape

    def rows(start: int, stop: int) -> torch.Tensor:
        index = torch.arange(start, stop, device=kernel.device)
        shifts = (torch.arange(size, device=kernel.device) - (index % size).unsqueeze(1)) % size
        found = kernel[index // size]
        return found.gather(2, shifts.unsqueeze(1).expand(found.shape)).flatten(1)

    return ByRows(blocks_out * size, rows)


def _gralora(parts: Parts, weight: Weight) -> Change:
    """GraLoRA (arXiv:2505.20355): a pair for each block of a grid, and a plain pair beside them."""
    grid, width, rank = parts["gralora_A"].shape
    height = parts["gralora_B"].shape[2]
    a = parts["gralora_A"].view(grid, width, grid, rank // grid)
    b = parts["gralora_B"].view(grid, grid, rank // grid, height)
    general = "gralora_A_general" in parts
    scale = weight.strength(rank=rank + (parts["gralora_A_general"].shape[0] if general else 0))

    def rows(start: int, stop: int) -> torch.Tensor:
        found = []
        for block in range(start // height, -(-stop // height)):
            of = slice(max(start - block * height, 0), min(stop - block * height, height))
            found.append(torch.einsum("nso,nis->oni", b[block, :, :, of], a[:, :, block]).flatten(1))
        values = torch.cat(found)
        if general:
            values = values + parts["gralora_B_general"][start:stop] @ parts["gralora_A_general"]
        return values * scale

    return ByRows(grid * height, rows)


def _delora(parts: Parts, weight: Weight) -> Change:
    """DeLoRA (arXiv:2503.18225): a pair of normalised rows and columns, times a bound and the lengths of the base's
    columns that the adapter has saved."""
    a, b = parts["delora_A"], parts["delora_B"]
    lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return LowRank(b * (parts["delora_lambda"] / a.shape[0] / lengths), a * parts["delora_w_norm"])


def _vblora(parts: Parts, weight: Weight) -> Change:
    """VB-LoRA (arXiv:2405.15179): a pair put together of weighted means of the bank's vectors."""
    a, b = (_of_bank(parts, side, weight) for side in "AB")
    return LowRank(b.transpose(1, 2).flatten(0, 1), a.flatten(1))


def _of_bank(parts: Parts, side: str, weight: Weight) -> torch.Tensor:
    bank, name = parts["vblora_vector_bank"], f"vblora_logits_{side}"
    if name in parts:
        logits, indices = parts[name].topk(weight.count("topk"), dim=-1)
        shares = logits.softmax(-1)
    else:
        indices, first = parts[f"{name}_topk_indices"].long(), parts[f"{name}_topk_weights"]
        shares = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
    return torch.einsum("...k,...kv->...v", shares, bank[indices])


def _randlora(parts: Parts, weight: Weight) -> Change:
    """RandLoRA (arXiv:2502.00987): scaled sums of shared matrices; the scales go with the smaller side."""
    small, large = sorted((weight.outputs, weight.inputs))
    scales = parts["randlora_lambda"]
    rank, bases = scales.shape
    inner = (scales.unsqueeze(2) * parts["randlora_A"][:, :bases, :small] * parts["randlora_gamma"]).flatten(0, 1)
    outer = parts["randlora_B"][:large, :bases].flatten(1) * weight.strength("randlora_alpha", rank)
    return LowRank(outer, inner) if small == weight.inputs else LowRank(inner.T, outer.T)


_CHANGES: Mapping[str, Callable[[Parts, Weight], Change]] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "VERA": _vera,
    "MISS": _miss,
    "C3A": _c3a,
    "GRALORA": _gralora,
    "DELORA": _delora,
    "VBLORA": _vblora,
    "RANDLORA": _randlora,
}


def is_turned(delta: ModuleDelta, turned: bool | None, settings: MergeSettings, model_type: str) -> bool:
    """Whether the weight is kept as [in, out]. `turned`: what the running model says, where that is known."""
    if turned is not None:
        return turned
    return is_conv1d(delta.module, model_type) if model_type in CONV1D_MODELS else settings.fan_in_fan_out


def additive_change(
    delta: ModuleDelta,
    shape: Sequence[int],
    settings: MergeSettings,
    dtype: torch.dtype,
    weight: float,
    *,
    turned: bool,
) -> Change:
    """`weight` times what the module's tensors add to a weight of `shape`, in the weight's own orientation."""
    parts = {name: _wide(ref.read(), dtype) for name, ref in delta.parts.items()}
    return _scaled(_oriented(_natural(delta, parts, shape, settings, turned=turned), turned=turned), weight)


def _wide(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype) if values.is_floating_point() else values


def _natural(
    delta: ModuleDelta, parts: Parts, shape: Sequence[int], settings: MergeSettings, *, turned: bool
) -> Change:
    outputs, inputs = (shape[1], shape[0]) if turned else (shape[0], math.prod(shape[1:]))
    return _CHANGES[delta.method](parts, Weight(outputs, inputs, tuple(shape[2:]), settings, delta.module))


def _oriented(change: Change, *, turned: bool) -> Change:
    if not turned:
        return change
    if isinstance(change, LowRank):
        return LowRank(change.right.T, change.left.T)
    assert isinstance(change, ByRows)
    whole = change.of(0, change.height).T
    return ByRows(whole.shape[0], lambda start, stop: whole[start:stop])


def _scaled(change: Change, weight: float) -> Change:
    if weight == 1:
        return change
    if isinstance(change, LowRank):
        return LowRank(change.left * weight, change.right)
    assert isinstance(change, ByRows)
    return ByRows(change.height, lambda start, stop: change.of(start, stop) * weight)


def additive_misfit(delta: ModuleDelta, shape: Sequence[int], settings: MergeSettings, *, turned: bool) -> str | None:
    """Why the module's tensors cannot be added to a weight of `shape`; None when they can: the change is computed on
    shapes alone."""
    if len(shape) < 2:
        return f"{delta.module}: {delta.method} adds a matrix, the base's weight is {list(shape)}"
    parts = {
        name: torch.empty(ref.shape, dtype=_meta_dtype(ref.dtype), device="meta") for name, ref in delta.parts.items()
    }
    rows, columns = shape[0], math.prod(shape[1:])
    try:
        change = _oriented(_natural(delta, parts, shape, settings, turned=turned), turned=turned)
        if isinstance(change, LowRank):
            found = change.left.shape[0], change.right.shape[1], change.left.shape[1] - change.right.shape[0]
        else:
            assert isinstance(change, ByRows)
            found = change.height, change.of(0, 1).shape[1], 0
        if found != (rows, columns, 0):
            raise ValueError(f"{found}, not {(rows, columns)}")
    except KeyError as error:
        return f"{delta.module}: the adapter is incomplete, it has no {error.args[0]} ({delta.described})"
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError, OverflowError):
        return f"{delta.module}: {delta.described} do not fit the base's weight {list(shape)}: another base"
    return None


def _meta_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def additive_part(change: Change, piece: Piece, shape: Sequence[int]) -> Change:
    """What the change of a model's tensor adds to the stored tensor that `piece` is a block of."""
    if isinstance(change, ByRows):
        change = Dense(change.of(0, change.height))
    return stored_part(change, piece, shape)
