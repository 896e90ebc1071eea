"""Block-diagonal LoRA (BD-LoRA): of A or of B only the blocks on the diagonal are stored, one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from weightport.checkpoints import TensorRef
from weightport.errors import AdapterError


def expanded(settings: Mapping[str, Any], module: str, a: TensorRef, b: TensorRef) -> tuple[TensorRef, TensorRef]:
    """A [rank, in] and B [out, rank] of a module, from what the file holds under these settings (adapter_config.json's
    use_bdlora). Raises AdapterError for settings that are none."""
    chosen = {side: _chosen(settings, f"target_modules_bd_{side}", module) for side in "ab"}
    blocks = settings.get("nblocks", 1)
    if type(blocks) is not int or blocks < 1 or all(chosen.values()):
        raise AdapterError(f"use_bdlora is {dict(settings)!r}: it says not which of A and B of {module} are blocks.")
    return (_filled(a, blocks) if chosen["a"] else a), (_filled(b, blocks) if chosen["b"] else b)


def _chosen(settings: Mapping[str, Any], field: str, module: str) -> bool:
    names = settings.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"use_bdlora: {field} is {names!r}; expected parts of module names.")
    return any(name in module.rpartition(".")[2] for name in names)


def _filled(ref: TensorRef, blocks: int) -> TensorRef:
    """[rows, columns of a block] with the blocks on the diagonal and zeros beside them."""
    if len(ref.shape) != 2 or ref.shape[0] % blocks:
        raise AdapterError(f"{ref.name} {list(ref.shape)} is no row of {blocks} blocks (use_bdlora).")

    def load() -> torch.Tensor:
        return torch.block_diag(*ref.read().chunk(blocks))

    return replace(ref, shape=(ref.shape[0], ref.shape[1] * blocks), storage=(), load=load)
