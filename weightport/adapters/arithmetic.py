"""In which precision a weight and its change are added: one rule, wherever an adapter becomes part of a weight.

Weights of 16 bits are computed in float32, wider ones in float64, and the sum is rounded once.
"""

from __future__ import annotations

import torch


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """In which dtype weights of these dtypes are computed, so that the result is rounded once."""
    return torch.float64 if any(dtype.itemsize > 2 for dtype in dtypes) else torch.float32


def with_low_rank(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """weight + scaling · B·A, in the weight's dtype and shape.

    Linear: A [r, in], B [out, r]. Convolution: A [r, in, height, width], B [out, r, 1, 1].
    """
    wide = arithmetic_dtype(weight.dtype)
    product = (b.to(wide).flatten(1) * scaling) @ a.to(wide).flatten(1)
    return (weight.to(wide) + product.reshape(weight.shape)).to(weight.dtype)
