"""What may happen to tensors between a source name and a target name: operations that know their own inverse.

Each is a frozen value with `forward` (source tensors → target tensors) and `backward` (the other way). They work on
meta tensors too, which is how a plan learns every shape and dtype before a byte is read. They return views where they
can: the writer copies once, into the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = Sequence[torch.Tensor]


class Operation(Protocol):
    """A reversible step: backward(forward(sources)) equals sources bit for bit."""

    @property
    def name(self) -> str: ...

    def forward(self, sources: Tensors) -> Tensors: ...

    def backward(self, targets: Tensors) -> Tensors: ...


@dataclass(frozen=True)
class Copy:
    """One tensor, unchanged."""

    name: str = "copy"

    def forward(self, sources: Tensors) -> Tensors:
        return sources

    def backward(self, targets: Tensors) -> Tensors:
        return targets


COPY = Copy()


@dataclass(frozen=True)
class Permute:
    """Axes in another order: `dims[i]` is the source axis that becomes axis i. (1, 0) transposes a matrix."""

    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        return "transpose" if self.dims == (1, 0) else f"permute {self.dims}"

    def forward(self, sources: Tensors) -> Tensors:
        return [tensor.permute(self.dims) for tensor in sources]

    def backward(self, targets: Tensors) -> Tensors:
        inverse = tuple(self.dims.index(axis) for axis in range(len(self.dims)))
        return [tensor.permute(inverse) for tensor in targets]


@dataclass(frozen=True)
class Split:
    """One tensor into `parts` equal pieces along `dim`; backward concatenates them."""

    parts: int
    dim: int = 0

    @property
    def name(self) -> str:
        return f"split into {self.parts} along {self.dim}"

    def forward(self, sources: Tensors) -> Tensors:
        (tensor,) = sources
        if tensor.shape[self.dim] % self.parts:
            raise ValueError(f"axis {self.dim} of {tuple(tensor.shape)} does not divide into {self.parts} equal parts")
        return tensor.chunk(self.parts, self.dim)

    def backward(self, targets: Tensors) -> Tensors:
        return [torch.cat(tuple(targets), self.dim)]


@dataclass(frozen=True)
class Concatenate:
    """`parts` equal tensors into one along `dim`; backward splits it."""

    parts: int
    dim: int = 0

    @property
    def name(self) -> str:
        return f"concatenate {self.parts} along {self.dim}"

    def forward(self, sources: Tensors) -> Tensors:
        return Split(self.parts, self.dim).backward(sources)

    def backward(self, targets: Tensors) -> Tensors:
        return Split(self.parts, self.dim).forward(targets)


@dataclass(frozen=True)
class Reshape:
    """Another shape for the same row-major values; both shapes are stated, so that it can be undone."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"reshape {self.source} → {self.target}"

    def forward(self, sources: Tensors) -> Tensors:
        return [tensor.reshape(self.target) for tensor in sources]

    def backward(self, targets: Tensors) -> Tensors:
        return [tensor.reshape(self.source) for tensor in targets]


@dataclass(frozen=True)
class AppendRows:
    """`count` rows of zeros behind a matrix's own; backward takes them off."""

    count: int

    @property
    def name(self) -> str:
        return f"append {self.count} rows of zeros"

    def forward(self, sources: Tensors) -> Tensors:
        return [torch.cat([tensor, tensor.new_zeros(self.count, *tensor.shape[1:])]) for tensor in sources]

    def backward(self, targets: Tensors) -> Tensors:
        return [tensor[: tensor.shape[0] - self.count] for tensor in targets]
