"""Variants of 2025 (`final.pt`): low-rank pairs over the layers of the text model, merged while it is converted.

A file holds `text_model.transformer.h.N.<module>.parametrizations.weight.0.{A,B}`, A [rank, in] and B [out, rank],
without a scaling factor. Three modules have W + B @ A. `mixer.out_proj` does not: the original gives its pair what
goes into attention (the norm's output) and adds the result behind the projection, so that no change of that weight
computes the same. The two-layer network beside attention reads the same norm's output and adds to the same sum, and
gelu(z) - gelu(-z) = z for either flavour of GELU: 2 * rank further units with the rows A and -A, and the columns B and
-B, compute that pair exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.checkpoints.dtypes import element_type
from weightport.checkpoints.types import NamedTensors
from weightport.errors import CheckpointError, ConfigurationError
from weightport.families.moondream2.layouts import Found

PAIR = re.compile(
    r"text_model\.transformer\.h\.(\d+)\.(mixer\.Wqkv|mixer\.out_proj|mlp\.fc1|mlp\.fc2)"
    r"\.parametrizations\.weight\.0\.([AB])"
)
BESIDE_ATTENTION = "mixer.out_proj"
MODULES: Mapping[str, str] = {"mixer.Wqkv": "attn.qkv", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
"""The original's modules of 2025, by what a variant calls them."""


@dataclass(frozen=True)
class Pair:
    """One low-rank pair: `b` @ `a`."""

    a: TensorRef
    b: TensorRef

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in], computed in `dtype`."""
        return self.b.read().to(dtype) @ self.a.read().to(dtype)


@dataclass(frozen=True)
class MergedVariant:
    """The model with a variant merged: its tensors, and how many units its two-layer networks grew by."""

    tensors: NamedTensors
    grown: int
    note: str


def merge_variant(found: Found, variant: Checkpoint, dtype: torch.dtype | None) -> MergedVariant:
    """The tensors of a model of 2025 with `variant` merged into them, in `dtype` or their own.

    Products and sums are computed in float32 where both sides have 16 bits, else in float64, and rounded once. Nothing
    is read before a tensor is. Raises CheckpointError for a file that is no variant, ConfigurationError for one that
    does not fit the model.
    """
    pairs = _pairs(variant)
    if found.keys != "2025":
        raise ConfigurationError(
            f"{variant.path} is a variant of a model of 2025; this checkpoint's tensors are named as those of 2024."
        )
    problems = [problem for place, pair in pairs.items() if (problem := _misfit(found.tensors, place, pair))]
    if problems:
        raise ConfigurationError(
            f"{variant.path} is a variant of another model:\n      " + "\n      ".join(problems[:12])
        )
    changed: dict[str, TensorRef] = {}
    for (layer, module), pair in pairs.items():
        if module != BESIDE_ATTENTION:
            ref = found.tensors[_weight(layer, module)]
            changed[ref.name] = _computed(ref, ref.shape, dtype, _sum_of(ref, pair, dtype))
    beside = {layer: pair for (layer, module), pair in pairs.items() if module == BESIDE_ATTENTION}
    grown = 2 * max((pair.rank for pair in beside.values()), default=0)
    if grown:
        for layer in _layers(found.tensors):
            rows, columns = (beside[layer].a, beside[layer].b) if layer in beside else (None, None)
            for leaf, axis, half in (("fc1.weight", 0, rows), ("fc1.bias", 0, None), ("fc2.weight", 1, columns)):
                name = f"text.blocks.{layer}.mlp.{leaf}"
                if name in found.tensors:
                    changed[name] = _widened(changed.get(name, found.tensors[name]), axis, half, grown, dtype)
    tensors = NamedTensors(changed.get(name, ref) for name, ref in found.tensors.items())
    return MergedVariant(tensors, grown, _note(variant, len(pairs), grown))


def _note(variant: Checkpoint, pairs: int, grown: int) -> str:
    said = f"{variant.path.name}: {pairs} low-rank pairs were merged."
    if not grown:
        return said
    return (
        f"{said} Those of out_proj read what goes into attention, as the original computes them, and stand in {grown} "
        "further units of each layer's two-layer network."
    )


def _pairs(variant: Checkpoint) -> dict[tuple[int, str], Pair]:
    """The pairs by (layer, module). Raises CheckpointError."""
    halves: dict[tuple[int, str], dict[str, TensorRef]] = {}
    for name, ref in variant.items():
        match = PAIR.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{variant.path} is no variant of moondream2: it holds {name}, where only pairs "
                "text_model.transformer.h.N.….parametrizations.weight.0.A and .B are expected."
            )
        halves.setdefault((int(match[1]), match[2]), {})[match[3]] = ref
    if not halves:
        raise CheckpointError(f"{variant.path} holds no tensors; expected the pairs of a variant (final.pt).")
    for (layer, module), pair in halves.items():
        if set(pair) != {"A", "B"}:
            missing = "B" if "A" in pair else "A"
            raise CheckpointError(f"{variant.path}: layer {layer}, {module} lacks {missing}: the file is not whole.")
    return {place: Pair(pair["A"], pair["B"]) for place, pair in sorted(halves.items())}


def _misfit(tensors: NamedTensors, place: tuple[int, str], pair: Pair) -> str | None:
    """What keeps a pair from fitting the model."""
    layer, module = place
    where = f"layer {layer}, {module}"
    if _weight(layer, module) not in tensors:
        return f"{where}: the model has {len(_layers(tensors))} layers"
    rows, columns = tensors[_weight(layer, module)].shape
    if module == BESIDE_ATTENTION:
        # It reads the text model's width, as attention does, whatever the width of what attention gives.
        columns = tensors[f"text.blocks.{layer}.attn.qkv.weight"].shape[1]
    a, b = pair.a.shape, pair.b.shape
    if len(a) != 2 or len(b) != 2 or 0 in a or a[0] != b[1] or (b[0], a[1]) != (rows, columns):
        return f"{where}: A is {list(a)} and B {list(b)}, for a weight of [{rows}, {columns}]"
    return None


def _weight(layer: int, module: str) -> str:
    return f"text.blocks.{layer}.{MODULES.get(module, 'attn.proj')}.weight"


def _layers(tensors: NamedTensors) -> list[int]:
    found: list[int] = []
    while f"text.blocks.{len(found)}.attn.qkv.weight" in tensors:
        found.append(len(found))
    return found


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if any(dtype.itemsize > 2 for dtype in dtypes) else torch.float32


def _sum_of(ref: TensorRef, pair: Pair, dtype: torch.dtype | None) -> Callable[[], torch.Tensor]:
    wide = _wide(ref.dtype, pair.a.dtype, pair.b.dtype, dtype or ref.dtype)
    return lambda: pair.product(wide).add_(ref.read().to(wide))


def _widened(ref: TensorRef, axis: int, half: TensorRef | None, by: int, dtype: torch.dtype | None) -> TensorRef:
    """`ref` with `by` further rows or columns: those of `half` and of its negative, then zeros."""
    shape = tuple(size + by * (place == axis) for place, size in enumerate(ref.shape))

    def values() -> torch.Tensor:
        own = ref.read()
        further = own.new_zeros([by if place == axis else size for place, size in enumerate(own.shape)])
        if half is not None:
            pair = half.read().to(own.dtype)
            rank = pair.shape[axis]
            further.narrow(axis, 0, rank).copy_(pair)
            further.narrow(axis, rank, rank).copy_(pair).neg_()
        return torch.cat([own, further], dim=axis)

    return _computed(ref, shape, dtype, values)


def _computed(
    ref: TensorRef, shape: tuple[int, ...], dtype: torch.dtype | None, values: Callable[[], torch.Tensor]
) -> TensorRef:
    """A tensor in the place of `ref`."""
    kept = dtype or ref.dtype
    return replace(
        ref, shape=shape, element=element_type(kept), load=lambda: values().to(kept).contiguous(), storage=()
    )
