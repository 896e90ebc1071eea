"""What methods other than LoRA add to a weight, computed a second time for the check of a merge: in float64, and by
what the method does to an input, not by the merge's formulas.

Every function takes inputs x [n, in] to what the adapter adds to the layer's outputs [n, out]; the identity as input
gives the matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weightport.adapters.merging.lora_targets import DeltaChange
from weightport.adapters.merging.spectral_check import fourier, waves
from weightport.adapters.reading.additive_tensors import ModuleDelta
from weightport.checkpoints import TensorRef

Settings = Mapping[str, Any]
Parts = Mapping[str, torch.Tensor]


_INPUTS = 512
"""Columns of the matrix that are computed at a time."""


class ExpectedDelta:
    """What a change adds to a stored tensor of `shape`: float64."""

    def __init__(
        self, change: DeltaChange, settings: Settings, weight: float, shape: Sequence[int], base: TensorRef
    ) -> None:
        place, piece = change.part.place, change.part.piece
        turned = bool(settings.get("fan_in_fan_out")) if place.turned is None else place.turned
        self._values = expected_matrix(
            change.delta, settings, weight, shape if change.part.plain else place.shape, base, turned=turned
        )
        if not change.part.plain:
            spans = tuple(slice(start, start + piece.extent(axis)) for axis, start in enumerate(piece.start))
            whole = torch.zeros(tuple(shape), dtype=torch.float64)
            block = self._values[spans].permute([piece.axes.index(axis) for axis in range(len(piece.axes))])
            whole[tuple(slice(*span) for span in piece.source)] = block
            self._values = whole

    def matrix(self, columns: int) -> torch.Tensor:
        """All of it, as [rows, columns]."""
        return self._values.reshape(-1, columns)


def expected_matrix(
    delta: ModuleDelta, settings: Settings, weight: float, shape: Sequence[int], base: TensorRef, *, turned: bool
) -> torch.Tensor:
    """`weight` times what is added to a weight of `shape`, as float64 of that shape; `base` for what depends on it."""
    parts = {name: ref.read().double() for name, ref in delta.parts.items()}
    outputs, inputs = (shape[1], shape[0]) if turned else (shape[0], math.prod(shape[1:]))
    if delta.method in ("LOHA", "LOKR"):
        matrix = _MATRICES[delta.method](parts, shape) * _alpha_by_rank(settings, delta.module)
    elif delta.method in _SPECTRA:
        (spectrum,) = parts.values()
        matrix = _SPECTRA[delta.method](spectrum, settings, outputs, inputs)
    elif settings.get("init_weights") == "bat":
        values = base.read().double()
        matrix = _bat(values.T if turned else values.reshape(outputs, inputs), parts["miss_block"])
    else:
        matrix = torch.empty(outputs, inputs, dtype=torch.float64)
        for start in range(0, inputs, _INPUTS):
            stop = min(start + _INPUTS, inputs)
            x = torch.zeros(stop - start, inputs, dtype=torch.float64)
            x[:, start:stop].fill_diagonal_(1)
            matrix[:, start:stop] = _APPLIED[delta.method](x, parts, settings, outputs).T
    return (matrix.T if turned else matrix).reshape(tuple(shape)) * weight


def _alpha_by_rank(settings: Settings, module: str) -> float:
    def of(field: str, name: str) -> float:
        found = (value for key, value in (settings.get(field) or {}).items() if re.search(rf"(^|\.)({key})$", module))
        return float(next(found, settings[name]))

    return of("alpha_pattern", "alpha") / of("rank_pattern", "r")


def _loha(parts: Parts, shape: Sequence[int]) -> torch.Tensor:
    factors = []
    for place in "12":
        a, b, core = (parts.get(f"hada_{name}") for name in (f"w{place}_a", f"w{place}_b", f"t{place}"))
        assert a is not None and b is not None
        factors.append(
            torch.einsum("or,ri->oi", a, b) if core is None else torch.einsum("ijkl,ip,jr->prkl", core, a, b)
        )
    return factors[0].reshape(shape[0], -1).mul(factors[1].reshape(shape[0], -1))


def _lokr(parts: Parts, shape: Sequence[int]) -> torch.Tensor:
    def factor(name: str) -> torch.Tensor:
        if name in parts:
            return parts[name]
        a, b, core = parts[f"{name}_a"], parts[f"{name}_b"], parts.get("lokr_t2")
        if core is not None and name == "lokr_w2":
            return torch.einsum("ijkl,ip,jr->prkl", core, a, b)
        return torch.einsum("or,ri->oi", a, b)

    left, right = factor("lokr_w1"), factor("lokr_w2")
    if right.ndim == 4:
        left = left[:, :, None, None]
    return torch.kron(left, right.contiguous()).reshape(shape[0], -1)


def _vera(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    inner = torch.nn.functional.linear(x, parts["vera_A"][:, : x.shape[1]]) * parts["vera_lambda_d"]
    return torch.nn.functional.linear(inner, parts["vera_B"][:outputs]) * parts["vera_lambda_b"]


def _miss(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    block = parts["miss_block"]
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % len(block)))
    sums = padded.view(len(x), -1, len(block)).sum(1)
    return (sums @ block).tile(1, outputs // block.shape[1])


def _bat(values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(W + a row of identities) times each row's block."""
    size = blocks.shape[1]
    matrix = torch.empty_like(values)
    identity = torch.eye(size, dtype=values.dtype).repeat(1, values.shape[1] // size)
    for number, block in enumerate(blocks):
        rows = slice(number * size, (number + 1) * size)
        matrix[rows] = ((values[rows] + identity).reshape(-1, size) @ block).reshape(size, -1)
    return matrix


def _unilora(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    def matrix(side: str) -> torch.Tensor:
        places = parts[f"unilora_indices_{side}"].long()
        return parts["unilora_theta_d"].take(places).mul(parts[f"unilora_scales_{side}"])

    return torch.nn.functional.linear(torch.nn.functional.linear(x, matrix("A")), matrix("B"))


def _tinylora(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    narrow = x @ parts["tinylora_A"].T
    mixed = torch.zeros_like(narrow)
    for share, projection in zip(parts["tinylora_v"], parts["tinylora_P"]):
        mixed += share * (narrow @ projection.T)
    return torch.nn.functional.linear(mixed, parts["tinylora_B"])


def _c3a(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    kernel = parts["c3a_kernel"]
    split = torch.fft.ifft(x.view(len(x), kernel.shape[1], kernel.shape[2]))
    product = torch.einsum("xnb,mnb->xmb", split, torch.fft.fft(kernel))
    return torch.fft.fft(product).real.flatten(1) / x.shape[1]


def _gralora(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    a, b = parts["gralora_A"], parts["gralora_B"]
    grid, width, rank = a.shape
    inner = torch.einsum("xni,nir->xnr", x.view(len(x), grid, width), a).view(len(x), grid, grid, rank // grid)
    mixed = inner.transpose(1, 2).reshape(len(x), grid, rank)
    added = torch.einsum("xjr,jro->xjo", mixed, b).flatten(1)
    hybrid = 0
    if "gralora_A_general" in parts:
        hybrid = len(parts["gralora_A_general"])
        added = added + x @ parts["gralora_A_general"].T @ parts["gralora_B_general"].T
    return added * settings["alpha"] / (rank + hybrid)


def _delora(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    a, b = parts["delora_A"], parts["delora_B"]
    inner = (x * parts["delora_w_norm"]) @ a.T
    bound = parts["delora_lambda"] / len(a)
    return inner / a.square().sum(1).sqrt().clamp(min=1e-4) * bound @ (b / b.square().sum(0).sqrt().clamp(min=1e-4)).T


def _vblora(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    def matrix(side: str) -> torch.Tensor:
        logits = parts.get(f"vblora_logits_{side}")
        if logits is None:
            places = parts[f"vblora_logits_{side}_topk_indices"].long()
            shares = parts[f"vblora_logits_{side}_topk_weights"]
            shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1)
        else:
            top, places = torch.topk(logits, settings["topk"])
            shares = torch.softmax(top, -1)
        dense = torch.zeros(*places.shape[:2], len(parts["vblora_vector_bank"]), dtype=torch.float64)
        return dense.scatter(-1, places, shares) @ parts["vblora_vector_bank"]

    a, b = matrix("A"), matrix("B")
    inner = torch.einsum("xtv,rtv->xr", x.view(len(x), a.shape[1], -1), a)
    return torch.einsum("xr,trv->xtv", inner, b).flatten(1)


def _randlora(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    scales, gamma = parts["randlora_lambda"], parts["randlora_gamma"]
    small, large = min(x.shape[1], outputs), max(x.shape[1], outputs)
    inner = torch.einsum("rn,rnm,nm->rnm", scales, parts["randlora_A"].expand(-1, len(gamma), -1)[..., :small], gamma)
    inner, outer = inner.reshape(-1, small), parts["randlora_B"][:large, : len(gamma)].reshape(large, -1)
    strength = settings["randlora_alpha"] / len(scales)
    return x @ inner.T @ outer.T * strength if small == x.shape[1] else x @ outer @ inner * strength


_SPECTRA: Mapping[str, Callable[[torch.Tensor, Settings, int, int], torch.Tensor]] = {
    "FOURIERFT": fourier,
    "WAVEFT": waves,
}
_MATRICES: Mapping[str, Callable[[Parts, Sequence[int]], torch.Tensor]] = {"LOHA": _loha, "LOKR": _lokr}
_APPLIED: Mapping[str, Callable[[torch.Tensor, Parts, Settings, int], torch.Tensor]] = {
    "VERA": _vera,
    "MISS": _miss,
    "C3A": _c3a,
    "GRALORA": _gralora,
    "DELORA": _delora,
    "VBLORA": _vblora,
    "RANDLORA": _randlora,
    "UNILORA": _unilora,
    "TINYLORA": _tinylora,
}
