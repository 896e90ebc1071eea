"""Several adapters in one merge: their weighted sum, or one of peft's other combinations (add_weighted_adapter).

`cat` is the weighted sum of the changes, W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ, exactly; every other combination is peft's approximation
of the same name, computed as peft 0.21 does: on A and on B apart (linear, ties, magnitude_prune), or on the product,
of which a truncated singular value decomposition keeps the largest rank among the adapters (svd, ties_svd,
magnitude_prune_svd).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from weightport.adapters.merging.low_rank_delta import LowRank, Pair
from weightport.errors import UsageError

SUM = "cat"
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
NEEDS_DENSITY = ("ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
COMBINATIONS = (SUM, "linear", "svd", *NEEDS_DENSITY)


@dataclass(frozen=True)
class Combination:
    """How adapters are combined. `density`: the share of values kept before combining, largest first."""

    kind: str = SUM
    density: float | None = None
    majority_sign: str = "total"
    svd_rank: int | None = None


@dataclass(frozen=True)
class Weighted:
    """An adapter's pair for one weight, its scaling (alpha / r), and the weight that the user gave the adapter."""

    pair: Pair
    scaling: float
    weight: float


def combines_matrices(combination: Combination) -> bool:
    """Whether A and B are combined apart, which takes one rank of all adapters in a module."""
    return combination.kind in ("linear", "ties", "magnitude_prune")


def check_combination(combination: Combination, ranks: Sequence[int], *, rslora: bool) -> None:
    """Raises UsageError for a combination that cannot be had of adapters whose largest ranks are `ranks`."""
    kind = combination.kind
    if kind in RANDOM:
        raise UsageError(
            f"{kind} drops values at random, in the order in which peft walks through the running model: files cannot "
            f"give the same. Use peft's add_weighted_adapter, or one of {', '.join(COMBINATIONS)}."
        )
    if kind not in COMBINATIONS:
        raise UsageError(f"{kind!r} is no combination; known are {', '.join(COMBINATIONS)}.")
    if kind in NEEDS_DENSITY and combination.density is None:
        raise UsageError(f"{kind} needs --density, the share of values to keep (between 0 and 1).")
    if kind not in NEEDS_DENSITY and combination.density is not None:
        raise UsageError(f"--density is for {', '.join(NEEDS_DENSITY)}, not for {kind}.")
    if combination.density is not None and not 0 < combination.density <= 1:
        raise UsageError(f"--density is {combination.density:g}; expected more than 0 and at most 1.")
    if combines_matrices(combination) and len(set(ranks)) > 1:
        raise UsageError(
            f"{kind} adds matrices of one rank; the adapters have the ranks {', '.join(map(str, ranks))}."
        )
    if kind != SUM and rslora:
        raise UsageError(
            f"{kind} of rank-stabilised adapters (use_rslora) comes out √r too strong in peft, so there is no number "
            f"to agree with. Use {SUM}, the exact weighted sum."
        )


def combine(combination: Combination, parts: Sequence[Weighted], rank: int) -> list[LowRank]:
    """The changes to one weight. `parts` are the adapters that touch it, in the order given; `rank` is the largest of
    any adapter of the merge in any module, which a decomposition keeps."""
    if combination.kind == SUM:
        return [part.pair.low_rank(part.scaling * part.weight) for part in parts]
    flipped = parts[0].pair.flipped
    if combination.kind.endswith("svd"):
        a, b = _decomposed(combination, parts, combination.svd_rank or rank)
    else:
        signs = [1.0 if part.scaling * part.weight >= 0 else -1.0 for part in parts]
        roots = [abs(part.scaling * part.weight) ** 0.5 for part in parts]
        rule = _rule(combination)
        a = rule([part.pair.a for part in parts], [root * sign for root, sign in zip(roots, signs)])
        b = rule([part.pair.b for part in parts], roots)
    return [Pair(a, b, flipped).low_rank(1.0)]


def _decomposed(combination: Combination, parts: Sequence[Weighted], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    # peft prunes the product in the weight's own orientation and decomposes it as [out, in].
    flipped = parts[0].pair.flipped
    products = [part.scaling * (part.pair.b @ part.pair.a) for part in parts]
    product = _rule(combination)([p.T if flipped else p for p in products], [part.weight for part in parts])
    product = product.T if flipped else product
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


Rule = Callable[[list[torch.Tensor], list[float]], torch.Tensor]


def _rule(combination: Combination) -> Rule:
    density, sign = combination.density or 1.0, combination.majority_sign
    rules: Mapping[str, Rule] = {
        "linear": _weighted_sum,
        "svd": _weighted_sum,
        "ties": lambda tensors, weights: _ties(tensors, weights, density, sign),
        "magnitude_prune": lambda tensors, weights: _weighted_sum([_largest(t, density) for t in tensors], weights),
    }
    return rules[combination.kind if combination.kind == "svd" else combination.kind.removesuffix("_svd")]


def _weighted_sum(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total = total + tensor * weight
    return total


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """`tensor` with all but its int(density · elements) largest magnitudes set to zero."""
    if density >= 1:
        return tensor
    kept = torch.topk(tensor.abs().flatten(), k=int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view(tensor.shape), tensor, 0)


def _ties(tensors: list[torch.Tensor], weights: list[float], density: float, majority_sign: str) -> torch.Tensor:
    """TIES (arXiv:2306.01708): trim, elect a sign for each element, average what agrees with it."""
    trimmed = torch.stack([_largest(tensor, density) for tensor in tensors])
    votes = trimmed.sum(0) if majority_sign == "total" else trimmed.sign().sum(0)
    elected = torch.where(votes >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == elected
    scale = torch.tensor(weights, dtype=trimmed.dtype).view(-1, *[1] * (trimmed.ndim - 1))
    total: torch.Tensor = (trimmed * scale * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return total
