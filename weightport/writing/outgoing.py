"""One tensor on its way out: whatever made it, every writer takes it in this form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from weightport.checkpoints.lazy_tensors import Lazy, blocks, in_memory


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A tensor to be written: `dtype` is what stands in the file.

    `blocks()` yields its values in row-major order as contiguous tensors of `dtype`, computed as they are asked for.
    `origin` names what they come from, for errors. Outgoing tensors of one `storage` are one tensor under several
    names; a format that can (torch's) stores it once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[torch.Tensor]]
    origin: str = ""
    storage: str = ""

    @staticmethod
    def of(name: str, tensor: Lazy | torch.Tensor, dtype: torch.dtype | None = None, *, storage: str = "") -> Outgoing:
        """`tensor` under the name `name`, in `dtype` (None: its own)."""
        lazy = in_memory(tensor) if isinstance(tensor, torch.Tensor) else tensor
        written = dtype or lazy.dtype
        return Outgoing(name, tuple(lazy.shape), written, lambda: blocks(lazy, written), storage=storage)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def storage_key(self) -> str:
        return self.storage or self.name
