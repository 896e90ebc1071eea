"""How far two correct implementations may lie apart: the noise of floating-point arithmetic, and nothing beyond it.

Where a reference holds a seam in float32 and in float64, the noise is measured: the largest error of the original's
float32 against its own float64. Another correct implementation rounds elsewhere, so the largest of its errors over
many elements is another draw of the same size, and what is allowed is

    allowed = SPREAD · own                      float32 against float64
    allowed = SPREAD · own · √2                 float32 against float32: two independent errors
    allowed = SPREAD · own · √2 · eps64/eps32   float64 against float64

Where it holds one precision only, the noise follows from the depth. Every operation rounds to a relative `eps`.
Roundings of successive residual blocks are independent, so their sum grows with the square root of the number of
blocks; the largest of many elements lies a few standard deviations out. Hence the depth formula

    allowed = min(growth · eps · √(1 + depth), limit) · scale

with `eps` of the coarser of the two dtypes, `depth` the residual blocks before the seam, and `scale` the root mean
square of the reference at the seam. A family's growth and limit stand in its table, beside the sizes they were
measured on. The limit binds float32; it is √2 times as wide between two float32 runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

SPREAD = 3.0
"""Ours against the original's own noise, over the seams of 64 and more elements of every OFA and Florence-2 case, tiny
to full size: 0.5 to 1.5 in float32 against float64; against the same type, with √2 taken out, up to 1.5 in float32 and
1.6 in float64."""

MANY = 64
"""From so many elements on, their largest error is a measurement. That of a few may be small by chance: losses of the
same cases lie between 0 and 1.5e-7 from their float64 values. There the depth formula holds as well, and so it does
for gradients, whose sums every implementation takes in its own order: the norm of a head scale's gradient lay 5 times
the original's own noise away in a tiny model that is right."""

LAST_BITS = 4.0
"""A measured noise is no smaller than so many eps of the largest value: what is exact in one implementation (a table's
rows) may be a sum in the other."""

EXPLAINED = 10.0
"""A measured noise counts up to so many times what the depth formula, or the last bits of the largest value, explain.
The largest seen in a true reference is 1.4 times (stages of Florence-2-large). One that is far beyond was not computed
in float32 throughout (TF32, autocast), or was changed, and excuses nothing."""

GRADIENT_FLOOR = 1e-3
"""A parameter's gradient is measured against at least this part of the whole gradient: one that vanishes analytically
(the bias of a key projection: the softmax does not see it) is nothing but noise of the others."""

KINK = 1e-2
"""What is allowed, relative to the scale, of a float32 gradient that has passed rectifiers: where the input of one
lies within noise of zero, the gradient of that activation passes or does not. Measured at the first convolution of a
ResNet, the same model and inputs: 1.1e-4 of the scale with two threads, 3.0e-3 with one, whose sums round in another
order; in float64 both agree with the original to 8e-6, its own float32 noise. There the float64 run is the judge, and
the depth formula its limit: the original's float32 error says which rectifiers flipped, not how it rounds."""


HALF_GROWTH = 16.0
"""The growth of float16 and bfloat16, which no limit binds: forward passes of OFA and Florence-2 in them lie 2 to 18
eps from the float64 reference, at depths from 0 to 50. bfloat16's eps is 7.8e-3, so such a run shows gross errors
only; it says whether the model runs in that type, and the float32 run whether it is right."""

SINGLE, DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Noise:
    """What arithmetic does in one family. `growth` in units of eps; `limit` relative to the scale: what a float32 port
    is held to, however deep it is, against what float64 gives."""

    growth: float
    limit: float

    def allowance(self, depth: int, *dtypes: torch.dtype, kinked: bool = False) -> float:
        """The depth formula: the largest error, in units of the scale, that arithmetic in the coarsest of `dtypes`
        explains `depth` blocks in."""
        precisions = [torch.finfo(dtype).eps for dtype in dtypes]
        eps = max(precisions)
        if eps > SINGLE:
            return HALF_GROWTH * eps * math.sqrt(1 + depth)
        # Where both sides round as coarsely, their errors are independent and add up.
        noise = min(self.growth * eps * math.sqrt(1 + depth), self.limit * math.sqrt(precisions.count(eps)))
        return max(noise, KINK) if kinked and eps > DOUBLE else noise


@dataclass(frozen=True)
class OwnNoise:
    """What the original's float32 run lies from its own float64 run at a seam: the largest error, in the seam's own
    units, over so many `elements`. `peak` is the largest value; `gradient` whether the seam is of a backward pass."""

    largest: float
    elements: int
    peak: float
    gradient: bool = False

    @property
    def decides(self) -> bool:
        """Whether the measured noise is the judge, where it is less than the depth formula too."""
        return self.elements >= MANY and not self.gradient

    def at(self, *dtypes: torch.dtype) -> float:
        """The error of one implementation in the coarsest of `dtypes`, in the seam's own units."""
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        return max(self.largest, LAST_BITS / SPREAD * SINGLE * self.peak) * eps / SINGLE

    def explained(self, formula: float, *dtypes: torch.dtype) -> float:
        """The most that counts as noise of arithmetic, where the depth formula gives `formula`."""
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        return EXPLAINED * max(formula, LAST_BITS * eps * self.peak)

    def allowance(self, formula: float, *dtypes: torch.dtype) -> float:
        """The largest error of another correct implementation, in the seam's own units."""
        own = min(self.at(*dtypes), self.explained(formula, *dtypes))
        return SPREAD * math.sqrt(2 if len(set(dtypes)) == 1 else 1) * own


@dataclass(frozen=True)
class Allowed:
    """What is allowed at a seam, in its own units. Up to `formula` the depth explains the error; above it, up to
    `largest`, the original's own noise does. `doubtful` says that this is more than arithmetic explains."""

    largest: float
    formula: float
    own: float | None = None
    doubtful: bool = False

    def at_least(self, error: float) -> Allowed:
        """The same where it allows `error`, else that."""
        return self if self.largest >= error else replace(self, largest=error, formula=error, own=None)

    @classmethod
    def of(
        cls, noise: Noise, own: OwnNoise | None, scale: float, depth: int, dtypes: tuple[torch.dtype, torch.dtype],
        kinked: bool,
    ) -> Allowed:  # fmt: skip
        """The measured noise where there is one, else the depth formula."""
        formula = scale * noise.allowance(depth, *dtypes, kinked=kinked)
        half = max(torch.finfo(dtype).eps for dtype in dtypes) > SINGLE
        if own is None or half or (kinked and torch.float32 not in dtypes):
            return cls(formula, formula)
        measured = own.allowance(formula, *dtypes)
        judged = measured if own.decides and not kinked else max(measured, formula)
        doubtful = own.at(*dtypes) > own.explained(formula, *dtypes)
        return cls(judged, min(formula, judged), own.at(*dtypes), doubtful)


def scale_of(reference: torch.Tensor) -> float:
    """Root mean square of the finite elements, in the reference's own units; 0 when there are none."""
    values = reference.double()
    values = values[values.isfinite()]
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def gradient_scale_of(gradient: torch.Tensor) -> float:
    """Root mean square of what is not zero: an embedding's gradient is that of the rows a batch uses."""
    return scale_of(gradient[gradient != 0])
