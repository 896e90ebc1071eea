"""The original's own noise at the seams of a run: its float32 against its float64, where the reference holds both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from weightport.parity.noise import GRADIENT_FLOOR, OwnNoise
from weightport.parity.reference import Expected, Run
from weightport.parity.seams import DERIVED, base_seam
from weightport.parity.training import GRADIENT, GRADIENT_NORM, TOTAL_NORM, whole_gradient


def own_noise_of(run: Run, kinked: Callable[[str], bool] = lambda seam: False) -> dict[str, OwnNoise]:
    """By seam. Norms of gradients, one number a parameter, are measured together: the largest of all of them, relative
    to each one's scale, is the noise of each. `kinked` seams are measured alone.

    A generate run has none: its two precisions may have found other hypotheses.
    """
    if run.kind == "generate":
        return {}
    pairs = _pairs(run)
    alone = {
        seam: _own(*pair, gradient=seam.startswith((GRADIENT, TOTAL_NORM)))
        for seam, pair in pairs.items()
        if not seam.startswith(GRADIENT_NORM) or kinked(seam)
    }
    norms = {seam: pair for seam, pair in pairs.items() if seam not in alone}
    return {seam: own for seam, own in alone.items() if own is not None} | _together(norms, whole_gradient(run))


def _pairs(run: Run) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(float32, float64) values of the seams that the reference holds in both, and cut alike."""
    held: dict[str, dict[torch.dtype, Expected]] = {}
    for each in run.outputs:
        held.setdefault(each.seam, {})[each.dtype] = each
    found = {}
    for seam, by_dtype in held.items():
        single, double = by_dtype.get(torch.float32), by_dtype.get(torch.float64)
        if single is None or double is None or base_seam(seam)[1] in _IDS:
            continue
        if single.selection == double.selection and single.tensor.shape == double.tensor.shape:
            values = single.tensor.read(), double.tensor.read()
            if all(value.is_floating_point() for value in values):
                found[seam] = (values[0].double(), values[1].double())
    return found


_IDS = frozenset(DERIVED) - {"lse"}


def _own(single: torch.Tensor, double: torch.Tensor, gradient: bool) -> OwnNoise | None:
    error = (single - double).abs()
    error = error[error.isfinite()]
    if not error.numel():
        return None
    return OwnNoise(float(error.max()), error.numel(), float(double[double.isfinite()].abs().max()), gradient)


def _together(norms: Mapping[str, tuple[torch.Tensor, torch.Tensor]], total: float) -> dict[str, OwnNoise]:
    scales = {seam: max(float(pair[1].abs().max()), GRADIENT_FLOOR * total) for seam, pair in norms.items()}
    errors = [float((pair[0] - pair[1]).abs().max()) / scales[seam] for seam, pair in norms.items() if scales[seam]]
    worst = max(errors, default=0.0)
    return {seam: OwnNoise(worst * scale, len(errors), scale, gradient=True) for seam, scale in scales.items()}
