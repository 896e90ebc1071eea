"""How far two correct implementations may lie apart: the noise of floating-point arithmetic, and nothing beyond it.

Every operation rounds to a relative `eps`. Roundings of successive residual blocks are independent, so their sum grows
with the square root of the number of blocks; the largest of many elements lies a few standard deviations out. Hence,
for the largest absolute error of a seam,

    allowed = min(growth · eps · √(1 + depth), limit) · scale

with `eps` of the coarser of the two dtypes, `depth` the residual blocks before the seam, and `scale` the root mean
square of the reference at the seam. A family's growth and limit are calibrated on the original's runs against
independent implementations, and stand in its table. The limit binds float32; it is √2 times as wide between two
float32 runs, whose errors are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

GRADIENT_FLOOR = 1e-3
"""A parameter's gradient is measured against at least this part of the whole gradient: one that vanishes analytically
(the bias of a key projection: the softmax does not see it) is nothing but noise of the others."""

KINK = 1e-2
"""What is allowed, relative to the scale, of a float32 gradient that has passed rectifiers: where the input of one
lies within noise of zero, the gradient of that activation passes or does not. Measured at the first convolution of a
ResNet, the same model and inputs: 1.1e-4 of the scale with two threads, 3.0e-3 with one, whose sums round in another
order; in float64 both agree with the original to 8e-6, its own float32 noise. There the float64 run is the judge."""


HALF_GROWTH = 16.0
"""The growth of float16 and bfloat16, which no limit binds: forward passes of OFA and Florence-2 in them lie 2 to 18
eps from the float64 reference, at depths from 0 to 50. bfloat16's eps is 7.8e-3, so such a run shows gross errors
only; it says whether the model runs in that type, and the float32 run whether it is right."""


@dataclass(frozen=True)
class Noise:
    """What arithmetic does in one family. `growth` in units of eps; `limit` relative to the scale: what a float32 port
    is held to, however deep it is, against what float64 gives."""

    growth: float
    limit: float

    def allowance(self, depth: int, *dtypes: torch.dtype, kinked: bool = False) -> float:
        """Largest error, in units of the scale, that arithmetic in the coarsest of `dtypes` explains `depth` blocks
        in."""
        precisions = [torch.finfo(dtype).eps for dtype in dtypes]
        eps = max(precisions)
        if eps > torch.finfo(torch.float32).eps:
            return HALF_GROWTH * eps * math.sqrt(1 + depth)
        # Where both sides round as coarsely, their errors are independent and add up.
        noise = min(self.growth * eps * math.sqrt(1 + depth), self.limit * math.sqrt(precisions.count(eps)))
        return max(noise, KINK) if kinked and eps > torch.finfo(torch.float64).eps else noise


def scale_of(reference: torch.Tensor) -> float:
    """Root mean square of the finite elements, in the reference's own units; 0 when there are none."""
    values = reference.double()
    values = values[values.isfinite()]
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
