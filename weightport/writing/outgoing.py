"""One tensor on its way out: whatever made it, every writer takes it in this form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch


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

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def storage_key(self) -> str:
        return self.storage or self.name
