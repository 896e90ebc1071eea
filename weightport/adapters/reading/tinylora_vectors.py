"""Which of TinyLoRA's vectors a module has.

The file does not say. It follows from the module's number among those of the running model, and that number from its
saved projection, which peft draws with a seed of its own for each number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.reading.lora_settings import is_number
from weightport.checkpoints import TensorRef
from weightport.converters.lora_patterns import shown
from weightport.errors import AdapterError

PART = "tinylora_v"
_VECTOR = re.compile(rf"(?:.+\.)?{PART}\.(?P<group>\d{{1,9}})")
_PROJECTION = re.compile(r"(?P<module>.+)\.tinylora_P(?:\.[^.]+)?")


def with_own_vectors(
    tensors: Mapping[str, TensorRef], settings: Mapping[str, Any], path: Path
) -> dict[str, TensorRef]:
    """The tensors by their keys without peft's prefix, each module's vector beside it as `….tinylora_v` instead of the
    numbered ones. Raises AdapterError where no projection says which it is."""
    vectors = {int(found["group"]): ref for name, ref in tensors.items() if (found := _VECTOR.fullmatch(name))}
    rest = {name: ref for name, ref in tensors.items() if not _VECTOR.fullmatch(name)}
    projections = {found["module"]: ref for name, ref in rest.items() if (found := _PROJECTION.fullmatch(name))}
    if not projections:
        raise AdapterError(
            f"{path} has no tinylora_P: it was saved without its projections (save_projection: false), by which it is "
            "known which vector belongs to which module. Save it with save_projection=True."
        )
    seed, tying = settings.get("projection_seed", 42), settings.get("weight_tying", 0.0)
    if type(seed) is not int or not 0 <= seed < 1 << 62 or not is_number(tying) or not 0 <= tying <= 1:
        raise AdapterError(
            f"{path}: projection_seed is {shown(seed)} and weight_tying {shown(tying)}; expected a whole number and "
            "one from 0 to 1."
        )
    numbers = _numbers(projections, seed)
    if sorted(numbers.values()) != list(range(len(projections))):
        raise AdapterError(
            f"{path}: the saved projections are not those of the seed {seed}, so nothing says which vector belongs to "
            "which module. Merge the adapter with peft's merge_and_unload."
        )
    groups = max(1, round(len(numbers) * (1.0 - tying)))
    each = max(1, len(numbers) // groups)
    for module, number in numbers.items():
        group = min(number // each, groups - 1)
        if group not in vectors:
            raise AdapterError(f"{path} has no {PART}.{group}, the vector of {module}; it is incomplete.")
        rest[f"{module}.{PART}"] = vectors[group]
    return rest


def _numbers(projections: Mapping[str, TensorRef], seed: int) -> dict[str, int]:
    """The number of each module whose projection is one that the seed gives."""
    drawn: dict[tuple[Any, ...], dict[bytes, int]] = {}
    found = {}
    for module, ref in projections.items():
        kind = (ref.shape, ref.dtype)
        if kind not in drawn:
            drawn[kind] = _drawn(ref.shape, ref.dtype, seed, len(projections))
        number = drawn[kind].get(_content(ref.read()))
        if number is not None:
            found[module] = number
    return found


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int, count: int) -> dict[bytes, int]:
    """Projections [u, r, r] of variance 1 / r by their content, with their numbers."""
    if len(shape) != 3 or 0 in shape or not dtype.is_floating_point:
        return {}
    deviation = 1.0 / shape[1] ** 0.5
    made = (
        torch.normal(0.0, deviation, shape, generator=torch.Generator().manual_seed(seed + number)).to(dtype)
        for number in range(count)
    )
    return {_content(values): number for number, values in enumerate(made)}


def _content(values: torch.Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
