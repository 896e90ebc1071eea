"""What may happen to tensors between a source name and a target name: operations that know their own inverse.

Operations chain, and one that works on a layer works on a stack of layers through `Unstack`.
"""

from __future__ import annotations

from weightport.converters.operations.composition import Chain, Stack, Unstack
from weightport.converters.operations.layout import Concatenate, JoinAroundZeros, Permute, Reshape, Split
from weightport.converters.operations.operation import COPY, Copy, Operation, applied
from weightport.converters.operations.values import Cast, Pad, Resize, Rounded, Truncate

__all__ = [
    "COPY",
    "Cast",
    "Chain",
    "Concatenate",
    "Copy",
    "JoinAroundZeros",
    "Operation",
    "Pad",
    "Permute",
    "Reshape",
    "Resize",
    "Rounded",
    "Split",
    "Stack",
    "Truncate",
    "Unstack",
    "applied",
]
