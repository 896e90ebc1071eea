"""What an operation is: a step between tensors of the original and native ones that knows its own inverse.

An operation takes lazy tensors to lazy tensors: shapes and dtypes at once, values when they are written. `forward`
goes from the original's tensors to the native ones, `backward` the other way; `backward(forward(sources))` equals the
sources bit for bit, but for the operations that say they are `lossy`. `pairs` says what the operation does to a LoRA
pair beside the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weightport.checkpoints.lazy_tensors import Lazy, in_memory
from weightport.converters.low_rank_pair import LowRankPair
from weightport.errors import AdapterError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """A step from `sources` tensors to `targets` tensors (None: as many as the tensors say, see Unstack).

    Raises ValueError from `forward` and `backward` for shapes that it does not apply to, and nothing has been read.
    """

    @property
    def name(self) -> str:
        """What it does, in the words of a plan's listing."""
        raise NotImplementedError

    @property
    def sources(self) -> int | None:
        return 1

    @property
    def targets(self) -> int | None:
        return 1

    @property
    def lossy(self) -> str | None:
        """What `backward` cannot restore, None where it restores everything."""
        return None

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        """The native tensors of the original's."""
        raise NotImplementedError

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        """The original's tensors of the native ones."""
        raise NotImplementedError

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        """The pairs beside the targets that do what `pair` does beside the source. Raises AdapterError where none
        does."""
        raise AdapterError(f"its weight goes through {self.name!r}, which a low-rank pair cannot follow")


def applied(step: Callable[[Sequence[Lazy]], Sequence[Lazy]], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`forward` or `backward` of an operation on tensors that are there."""
    return [made.read() for made in step([in_memory(tensor) for tensor in tensors])]


@dataclass(frozen=True)
class Copy(Operation):
    """One tensor, unchanged."""

    @property
    def name(self) -> str:
        return "copy"

    def forward(self, sources: Sequence[Lazy]) -> list[Lazy]:
        return list(sources)

    def backward(self, targets: Sequence[Lazy]) -> list[Lazy]:
        return list(targets)

    def pairs(self, pair: LowRankPair) -> list[LowRankPair]:
        return [pair]


COPY = Copy()


def has_own_rows(tensor: Lazy) -> bool:
    """Whether rows of the tensor are computed apart; else any row needs all that it is made of."""
    return getattr(tensor, "by_rows", True)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
