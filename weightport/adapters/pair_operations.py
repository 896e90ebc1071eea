"""What an operation on a weight means for the low-rank pair beside it, DoRA's magnitudes and the pair's bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightport.converters.operations import AppendRows, Copy, Operation, Split
from weightport.errors import AdapterError


@dataclass(frozen=True)
class Pair:
    """What trained beside one weight: A [rank, in, …], B [out, rank, …].

    magnitude: DoRA's length of each row of the weight, [out], beside convolutions [1, out, 1, 1]. bias: of B
    (lora_bias), [out].
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The pair under the keys that peft reads, without the prefix of a saved adapter."""
        found = {f"{module}.lora_A.weight": self.a, f"{module}.lora_B.weight": self.b}
        if self.magnitude is not None:
            found[f"{module}.lora_magnitude_vector"] = self.magnitude
        if self.bias is not None:
            found[f"{module}.lora_B.bias"] = self.bias
        return found


def followed(operation: Operation, pair: Pair) -> Sequence[Pair]:
    """The pairs beside the weights that `operation` makes, in the order of the rule's targets. Raises AdapterError
    where no pair does the same."""
    follow = _OPERATIONS.get(type(operation))
    if follow is None:
        raise AdapterError(f"its weight goes through {operation.name!r}, which a pair cannot follow")
    return follow(operation, pair)


def _append_rows(operation: AppendRows, pair: Pair) -> Sequence[Pair]:
    if pair.magnitude is not None:
        raise AdapterError(
            "the native model has rows of zeros below this weight's own, and DoRA divides each row by its length"
        )
    bias = None if pair.bias is None else operation.forward([pair.bias])[0]
    return [Pair(pair.a, operation.forward([pair.b])[0], bias=bias)]


def _split(operation: Split, pair: Pair) -> Sequence[Pair]:
    """Rows of the weight are rows of B, and of everything else that has one value an output; A is shared."""
    if operation.dim != 0:
        raise AdapterError(
            f"its weight goes through {operation.name!r}: only rows of a weight are split with its pair"
        )

    def rows(tensor: torch.Tensor | None, dim: int = 0) -> Sequence[torch.Tensor | None]:
        return [None] * operation.parts if tensor is None else Split(operation.parts, dim).forward([tensor])

    outputs = 0 if pair.magnitude is None or pair.magnitude.ndim == 1 else 1
    parts = zip(Split(operation.parts).forward([pair.b]), rows(pair.magnitude, outputs), rows(pair.bias))
    return [Pair(pair.a, b, magnitude, bias) for b, magnitude, bias in parts]


_OPERATIONS: dict[type, Callable[[Any, Pair], Sequence[Pair]]] = {
    Copy: lambda operation, pair: [pair],
    AppendRows: _append_rows,
    Split: _split,
}
