"""What adapters of methods other than LoRA add to a weight, each by the formula of its method's paper as peft 0.21
states it. Nothing is approximated: where peft would decompose the sum into a LoRA pair, the matrix itself is added.

A weight is seen as [out, in]; of a convolution [out, in · height · width]. Tensors may be on the meta device, where
only their shapes are checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from weightport.adapters.merging.low_rank_delta import CONV1D_MODELS, Change, Dense, LowRank, is_conv1d, stored_part
from weightport.adapters.merging.spectral_delta import fourierft, waveft
from weightport.adapters.merging.weight_delta import ByRows, Parts, Weight
from weightport.adapters.reading.additive_tensors import ModuleDelta, is_bat
from weightport.adapters.reading.lora_config import MergeSettings
from weightport.converters.stored_pieces import Piece
from weightport.errors import AdapterError


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
    if is_bat(weight.settings.data):
        return _bat(block, weight)
    if block.ndim != 2 or weight.outputs % block.shape[1]:
        raise ValueError("the block is no matrix over the outputs")
    left = block.repeat(1, weight.outputs // block.shape[1]).T
    places = torch.arange(weight.inputs, device=block.device) % block.shape[0]
    right = (places == torch.arange(block.shape[0], device=block.device).unsqueeze(1)).to(block.dtype)
    return LowRank(left, right)


def _bat(blocks: torch.Tensor, weight: Weight) -> Change:
    """MiSS with init_weights "bat": every square block of the weight times one of its block of rows, and that one
    added."""
    count, size, width = blocks.shape
    if size != width or count * size != weight.outputs:
        raise ValueError("the blocks are not square, or not over the outputs")
    values = torch.empty(weight.outputs, weight.inputs, device="meta") if blocks.is_meta else weight.values()

    def rows(start: int, stop: int) -> torch.Tensor:
        index = torch.arange(start, stop, device=blocks.device)
        own = values[start:stop].to(blocks.dtype).unflatten(1, (-1, size))
        product = torch.einsum("njs,nst->njt", own, blocks[index // size])
        return (product + blocks[index // size, index % size].unsqueeze(1)).flatten(1)

    return ByRows(weight.outputs, rows)


def _unilora(parts: Parts, weight: Weight) -> Change:
    """Uni-LoRA (arXiv:2506.00799): a pair whose elements are scaled values of one vector that all modules share."""
    shared = parts["unilora_theta_d"]
    for side in "AB":
        places = parts[f"unilora_indices_{side}"]
        if shared.ndim != 1 or places.dtype not in (torch.int32, torch.int64):
            raise ValueError("no vector, or no places in one")
        if not places.is_meta and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < len(shared):
            raise AdapterError(
                f"{weight.module}: unilora_indices_{side} go from {int(places.min())} to {int(places.max())}, but "
                f"unilora_theta_d has {len(shared)} values; the adapter is damaged."
            )
    a, b = (shared[parts[f"unilora_indices_{side}"]] * parts[f"unilora_scales_{side}"] for side in "AB")
    return LowRank(b, a)


def _tinylora(parts: Parts, weight: Weight) -> Change:
    """TinyLoRA (arXiv:2602.04118): a pair of the base's largest singular vectors, saved with the adapter, and between
    them a sum of random matrices."""
    between = torch.einsum("u,urs->rs", parts["tinylora_v"], parts["tinylora_P"])
    return LowRank(parts["tinylora_B"] @ between, parts["tinylora_A"])


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
    "FOURIERFT": fourierft,
    "WAVEFT": waveft,
    "UNILORA": _unilora,
    "TINYLORA": _tinylora,
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
    values: Callable[[], torch.Tensor],
    *,
    turned: bool,
) -> Change:
    """`weight` times what the module's tensors add to a weight of `shape`, in the weight's own orientation. `values`
    reads the base's, for methods whose change depends on them."""
    parts = {name: _wide(ref.read(), dtype) for name, ref in delta.parts.items()}
    return _scaled(_oriented(_natural(delta, parts, shape, settings, values, turned=turned), turned=turned), weight)


def _wide(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype) if values.is_floating_point() else values


def _natural(
    delta: ModuleDelta,
    parts: Parts,
    shape: Sequence[int],
    settings: MergeSettings,
    values: Callable[[], torch.Tensor],
    *,
    turned: bool,
) -> Change:
    outputs, inputs = (shape[1], shape[0]) if turned else (shape[0], math.prod(shape[1:]))

    def natural_values() -> torch.Tensor:
        return values().T if turned else values().reshape(outputs, inputs)

    weight = Weight(outputs, inputs, tuple(shape[2:]), settings, delta.module, natural_values)
    return _CHANGES[delta.method](parts, weight)


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
        change = _oriented(_natural(delta, parts, shape, settings, _not_read, turned=turned), turned=turned)
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


def _not_read() -> torch.Tensor:
    raise AssertionError("shapes need no values")


def _meta_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def additive_part(change: Change, piece: Piece, shape: Sequence[int]) -> Change:
    """What the change of a model's tensor adds to the stored tensor that `piece` is a block of."""
    if isinstance(change, ByRows):
        change = Dense(change.of(0, change.height))
    return stored_part(change, piece, shape)
