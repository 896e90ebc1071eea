"""Whether what weightport read is what another reader made of the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fuzzing.judge import MismatchError
from weightport.checkpoints.types import TensorRef

LARGEST_READ = 16 << 20
"""Bytes of a tensor that is read; a small file may stand for a much larger one (repeated values)."""


def read_all(tensors: Mapping[str, TensorRef]) -> dict[str, torch.Tensor]:
    """Every tensor that is not too large, in three ways that must agree: whole, in pieces, and in rows."""
    found: dict[str, torch.Tensor] = {}
    for name, ref in tensors.items():
        if ref.nbytes > LARGEST_READ:
            continue
        whole = ref.read()
        if tuple(whole.shape) != ref.shape or whole.dtype != ref.dtype:
            raise MismatchError(f"shape of a read tensor: {ref} was read as {whole.dtype} {tuple(whole.shape)}")
        flat = bits(whole)
        pieces = [bits(piece) for piece in ref.pieces(64)] if ref.nbytes <= 4096 else []
        if pieces and not torch.equal(torch.cat(pieces), flat):
            raise MismatchError(f"pieces: {ref} is other in pieces than whole")
        if ref.shape and ref.shape[0] > 1 and not torch.equal(bits(ref.rows(1, ref.shape[0])), bits(whole[1:])):
            raise MismatchError(f"rows: {ref} is other in rows than whole")
        found[name] = whole
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order, for NaN equals no NaN."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.clone(memory_format=torch.contiguous_format).as_strided(flat.shape, (1,)).view(torch.uint8)


def require_tensor(where: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise MismatchError(
            f"shape or dtype: {where} is {ours.dtype} {tuple(ours.shape)} here and {theirs.dtype} "
            f"{tuple(theirs.shape)} there"
        )
    if not torch.equal(bits(ours), bits(theirs)):
        raise MismatchError(f"values: {where} differs: {ours.reshape(-1)[:8]} here, {theirs.reshape(-1)[:8]} there")


def require_array(where: str, ours: torch.Tensor, theirs: np.ndarray[Any, Any]) -> None:
    if tuple(ours.shape) != theirs.shape:
        raise MismatchError(f"shape: {where} is {tuple(ours.shape)} here and {theirs.shape} there")
    plain = np.ascontiguousarray(theirs.astype(theirs.dtype.newbyteorder("=")))
    if plain.dtype == bool:
        # Of a truth value whose byte is neither 0 nor 1, torch's copy has 1.
        plain = plain.view(np.uint8) != 0
    if bits(ours).numpy().tobytes() != plain.tobytes():
        raise MismatchError(f"values: {where} differs from what numpy reads")


def require_names(ours: Any, theirs: Any) -> None:
    if set(ours) != set(theirs):
        raise MismatchError(f"names: {sorted(set(ours) ^ set(theirs))[:5]} are in one of the two")


class Documents:
    """Compares two documents of a pickle: ours, with TensorRef, and torch's."""

    def __init__(self, read: Mapping[int, torch.Tensor]) -> None:
        self.read = read
        self.seen: set[tuple[int, int]] = set()
        self.tensors = 0

    def require(self, where: str, ours: Any, theirs: Any) -> None:
        """Raises MismatchError where torch's has a plain value or a tensor that ours has otherwise."""
        if (id(ours), id(theirs)) in self.seen or len(self.seen) > 5000:
            return
        self.seen.add((id(ours), id(theirs)))
        if isinstance(theirs, torch.Tensor):
            self._tensor(where, ours, theirs)
        elif isinstance(theirs, dict):
            self._mapping(where, ours, theirs)
        elif type(theirs) in (list, tuple, torch.Size):
            if not isinstance(ours, (list, tuple)) or len(ours) != len(theirs):
                raise MismatchError(f"sequence: {where} is {type(ours).__name__} here, {len(theirs)} items there")
            for at, (one, other) in enumerate(zip(ours, theirs)):
                self.require(f"{where}[{at}]", one, other)
        elif type(theirs) in (int, bool, float, type(None)):
            nan = isinstance(theirs, float) and math.isnan(theirs)
            if type(ours) is not type(theirs) or not (ours == theirs or (nan and math.isnan(ours))):
                raise MismatchError(f"scalar: {where} is {ours!r:.80} here and {theirs!r:.80} there")
        elif type(theirs) is str and theirs.isascii() and theirs.isprintable() and ours != theirs:
            raise MismatchError(f"text: {where} is {ours!r:.80} here and {theirs!r:.80} there")

    def _tensor(self, where: str, ours: Any, theirs: torch.Tensor) -> None:
        if not isinstance(ours, TensorRef):
            raise MismatchError(f"tensor: {where} is {type(ours).__name__} here")
        if id(ours) in self.read and theirs.layout == torch.strided and theirs.device.type == "cpu":
            require_tensor(where, self.read[id(ours)], theirs)
            self.tensors += 1

    def _mapping(self, where: str, ours: Any, theirs: dict[Any, Any]) -> None:
        plain = all(type(key) is int or (type(key) is str and key.isascii()) for key in theirs)
        if not isinstance(ours, dict):
            raise MismatchError(f"mapping: {where} is {type(ours).__name__} here")
        if plain and list(ours) != list(theirs):
            raise MismatchError(f"keys: {where} has {list(ours)[:9]} here and {list(theirs)[:9]} there")
        for key in theirs if plain else ():
            self.require(f"{where}.{key}", ours[key], theirs[key])
