"""float64 runs of models whose code casts to float32: the casts are left out, so that the run is float64 throughout.

transformers computes some softmaxes, norms and losses in float32 whatever the model's dtype is. In a float64 run this
would hide differences below float32's noise, which is what such a run is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SOFTMAXES = frozenset(
    {
        functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax, torch.Tensor.softmax,
        torch.Tensor.log_softmax,
    }
)  # fmt: skip


class Float64Throughout(TorchFunctionMode):
    """While the block runs, a float64 tensor is not cast to float32, and whole numbers (positions, and the exponents
    of rotary frequencies) become float64 where they would become float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype in (torch.float64, torch.int64)
        if wide and func is torch.Tensor.float:
            return args[0].double()
        if wide and (func is torch.Tensor.to or func in _SOFTMAXES):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        if func is torch.arange and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
