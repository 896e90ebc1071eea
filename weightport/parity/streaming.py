"""Streamed weights: a model that computes in a wider type than its file holds, without a second copy of its weights.

Parameters stay as the file has them, memory-mapped, and an operation that takes one is given its value in the wider
type, which is freed when the operation is done. What a forward pass needs beside activations is one weight at a time,
and its results have the same bits as those of a model whose weights were widened first (of a product with a weight of
more than 128 MB, which is taken by blocks, the same within rounding). Whoever uses a parameter, and
how often, makes no difference: tied weights, heads that are embeddings, parameters that a parent module takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from weightport.parity.float64_arithmetic import Float64Throughout


@dataclass
class Residence:
    """How many bytes of widened weights may stay in memory between operations. 0: none."""

    left: int = 0

    def take(self, nbytes: int) -> bool:
        """Whether `nbytes` more may stay; they count from then on."""
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True


class WideWeight(torch.Tensor):
    """A weight that is `dtype` to everyone who takes it and is stored in another type.

    Written to in place, it becomes an ordinary copy in `dtype`; the file's memory is never written to.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    stored: torch.Tensor
    residence: Residence
    whole: WideWeight | None
    cut: Callable[[torch.Tensor], Any] | None
    resident: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, stored: torch.Tensor, dtype: torch.dtype, residence: Residence, whole: WideWeight | None = None,
        cut: Callable[[torch.Tensor], Any] | None = None,
    ) -> WideWeight:  # fmt: skip
        """`whole` and `cut`: of which weight this is a view, and how it is made of it."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, stored.size(), strides=stored.stride(), storage_offset=stored.storage_offset(), dtype=dtype,
            device=stored.device,
        )  # fmt: skip
        self.stored, self.residence, self.whole, self.cut, self.resident = stored, residence, whole, cut, None
        return self

    def wide(self) -> torch.Tensor:
        """The values in `dtype`, as an ordinary tensor."""
        if self.whole is not None and self.cut is not None:
            return self.cut(self.whole.wide())
        if self.resident is not None:
            return self.resident
        value = self.stored.to(self.dtype)
        if self.residence.take(value.nbytes):
            self.resident = value
        return value

    def own(self) -> torch.Tensor:
        """The values as a copy that may be written to, and that takes the place of what was stored."""
        if self.whole is not None:
            raise RuntimeError("A view of a streamed weight cannot be written to; write to the whole weight.")
        if self.stored.dtype != self.dtype:
            self.stored = self.stored.to(self.dtype)
        self.resident = None
        return self.stored

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default and isinstance(args[0], WideWeight) and args[0].whole is None:
            # The rows are taken first: a vocabulary is not widened for a sentence.
            return func(args[0].stored, *args[1:], **kwargs).to(args[0].dtype)
        if func.is_view and isinstance(args[0], WideWeight):
            return _view(func, args, kwargs)
        if func in _PRODUCTS and not kwargs and _is_large(args[-1]):
            return _product(args)
        written = [
            args[place]
            for place, argument in enumerate(func._schema.arguments[: len(args)])
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(args[place], WideWeight)
        ]
        plain = [each.own() if any(each is one for one in written) else _wide(each) for each in args]
        result = func(*plain, **{name: _wide(value) for name, value in kwargs.items()})
        return written[0] if written else result


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_BLOCK = 128 << 20
"""Bytes of a weight that are widened at a time, where it is the right factor of a product."""


def _is_large(factor: Any) -> bool:
    if not isinstance(factor, WideWeight) or factor.numel() * factor.dtype.itemsize <= _BLOCK:
        return False
    return (factor if factor.whole is None else factor.whole).resident is None


def _product(args: Sequence[Any]) -> torch.Tensor:
    """`mm(left, weight)` or `addmm(bias, left, weight)` by columns of the weight: a vocabulary's head is the largest
    tensor of a model, and four times as large in float64 as in float16."""
    *bias, left, weight = (*map(_wide, args[:-1]), args[-1])
    width = max(_BLOCK // (weight.dtype.itemsize * weight.shape[0]), 1)
    result = left.new_empty(left.shape[0], weight.shape[1])
    for start in range(0, weight.shape[1], width):
        columns = slice(start, start + width)
        block = weight.stored[:, columns].to(weight.dtype)
        if bias:
            added = bias[0][..., columns] if bias[0].shape[-1] == weight.shape[1] else bias[0]
            result[:, columns] = torch.addmm(added, left, block)
        else:
            result[:, columns] = left @ block
    return result


def _wide(value: Any) -> Any:
    if isinstance(value, WideWeight):
        return value.wide()
    return tree_map_only(WideWeight, WideWeight.wide, value) if isinstance(value, list | tuple) else value


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view of a weight is streamed as the weight is."""
    whole, rest = args[0], args[1:]
    views = func(whole.stored, *rest, **kwargs)
    if isinstance(views, torch.Tensor):
        return WideWeight(views, whole.dtype, whole.residence, whole, lambda each: func(each, *rest, **kwargs))

    def part(place: int) -> Callable[[torch.Tensor], Any]:
        return lambda each: func(each, *rest, **kwargs)[place]

    return [WideWeight(view, whole.dtype, whole.residence, whole, part(i)) for i, view in enumerate(views)]


def stream_weights(model: PreTrainedModel, dtype: torch.dtype, *, casts_to_float32: bool = False) -> None:
    """Let `model` compute in `dtype` with its parameters as they are. Buffers are small: they are widened at once.

    `casts_to_float32`: the model's own code computes in float32 what no file holds (rotary frequencies), which in
    float64 it does not then.
    """
    residence = Residence()
    streamed: dict[int, torch.Tensor] = {}
    with Float64Throughout() if casts_to_float32 and dtype == torch.float64 else nullcontext():
        exact = _computed_buffers(model, dtype)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                # Tied parameters are one object, and stay one.
                wide = streamed.setdefault(id(parameter), _parameter(parameter, dtype, residence))
                module._parameters[name] = wide
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                known = exact.get(f"{path}.{name}".lstrip("."))
                module._buffers[name] = buffer.to(dtype) if known is None else known
    for config in _configs(model.config):
        config.dtype = dtype


def _parameter(parameter: nn.Parameter, dtype: torch.dtype, residence: Residence) -> torch.Tensor:
    wide = WideWeight(parameter.detach(), dtype, residence)
    wide._is_param = True
    return wide.requires_grad_(parameter.requires_grad)


def _computed_buffers(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point buffers that no file holds (rotary frequencies, ...), as a model built in `dtype` has them: what
    was computed in a narrower type is not widened."""
    names = [name for name, buffer in model.named_non_persistent_buffers() if buffer.is_floating_point()]
    if not names:
        return {}
    config = copy.deepcopy(model.config)
    for each in _configs(config):
        each.dtype = dtype
    with _default_dtype(dtype), torch.no_grad():
        with torch.device("meta"):
            built = type(model)(config)
        for name in names:
            path, _, own = name.rpartition(".")
            module = built.get_submodule(path)
            module._buffers[own] = torch.empty_like(module.get_buffer(own), device="cpu")
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            _owner(built, path)._init_weights(built.get_submodule(path))
    return {name: built.get_buffer(name).to(model.device) for name in names}


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model of transformers that the module at `path` stands in: it knows how its buffers begin."""
    parts = path.split(".")
    inside = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((each for each in inside if isinstance(each, PreTrainedModel)), model)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and those of its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def resident_weights(model: nn.Module, nbytes: int) -> Iterator[None]:
    """While the block runs, streamed weights stay widened, up to `nbytes` of them: `generate` takes each at every
    token."""
    streamed = [each for each in model.parameters() if isinstance(each, WideWeight)]
    for residence in {id(each.residence): each.residence for each in streamed}.values():
        residence.left = nbytes
    try:
        yield
    finally:
        for each in streamed:
            each.resident = None
            each.residence.left = 0
