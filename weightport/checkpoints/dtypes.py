"""The names that checkpoint formats give to element types, and the type each one means.

Headers are read without torch, which takes longer to import than most headers to read: an ElementType knows torch's
name and the size, and has torch's own type when somebody asks for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ElementType:
    """A type of tensor elements: torch's name for it (`bfloat16`), and bytes of an element."""

    name: str
    itemsize: int

    @property
    def dtype(self) -> torch.dtype:
        """torch's own type. Imports torch."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found

    def __str__(self) -> str:
        return self.name


def element_type(dtype: torch.dtype) -> ElementType:
    """The type of elements that `dtype` is."""
    return ElementType(dtype_name(dtype), dtype.itemsize)


_SIZES = {
    1: "bool uint8 int8 float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz",
    2: "uint16 int16 float16 bfloat16",
    4: "uint32 int32 float32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
ELEMENT_TYPES: Mapping[str, ElementType] = {
    name: ElementType(name, size) for size, names in _SIZES.items() for name in names.split()
}


def _types(names: dict[str, str]) -> Mapping[str, ElementType]:
    return {name: ELEMENT_TYPES[own] for name, own in names.items()}


# Classes of torch's typed storages, as pickles name them (torch.FloatStorage). Quantized ones have no plain values.
TORCH_STORAGES = _types(
    {
        "DoubleStorage": "float64",
        "FloatStorage": "float32",
        "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16",
        "LongStorage": "int64",
        "IntStorage": "int32",
        "ShortStorage": "int16",
        "CharStorage": "int8",
        "ByteStorage": "uint8",
        "BoolStorage": "bool",
        "ComplexFloatStorage": "complex64",
        "ComplexDoubleStorage": "complex128",
    }
)

QUANTIZED_STORAGES = frozenset(
    {"QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"}
)

SAFETENSORS_TYPES = _types(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
    }
)

# NumPy's (kind, item size). V2 is bfloat16: numpy has no such type and writes JAX's as raw two-byte void.
NUMPY_TYPES = {
    ("b", 1): ELEMENT_TYPES["bool"],
    ("u", 1): ELEMENT_TYPES["uint8"],
    ("u", 2): ELEMENT_TYPES["uint16"],
    ("u", 4): ELEMENT_TYPES["uint32"],
    ("u", 8): ELEMENT_TYPES["uint64"],
    ("i", 1): ELEMENT_TYPES["int8"],
    ("i", 2): ELEMENT_TYPES["int16"],
    ("i", 4): ELEMENT_TYPES["int32"],
    ("i", 8): ELEMENT_TYPES["int64"],
    ("f", 2): ELEMENT_TYPES["float16"],
    ("f", 4): ELEMENT_TYPES["float32"],
    ("f", 8): ELEMENT_TYPES["float64"],
    ("c", 8): ELEMENT_TYPES["complex64"],
    ("c", 16): ELEMENT_TYPES["complex128"],
    ("V", 2): ELEMENT_TYPES["bfloat16"],
}


# What torch calls its element types, in any release; quantized ones, which have no plain values, are not among them.
_DTYPE_NAME = re.compile(r"bool|bit|(bfloat|float|double|half|uint|int|long|short|complex|chalf|cfloat|cdouble)\w*")


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype that a pickle names as `torch.{name}`; None for anything else of torch, which is not imported then."""
    if not _DTYPE_NAME.fullmatch(name):
        return None
    import torch

    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def is_dtype(value: Any) -> bool:
    """Whether `value` is a torch.dtype. Does not import torch: what is one came from it."""
    dtype = getattr(sys.modules.get("torch"), "dtype", None)
    return dtype is not None and isinstance(value, dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(text: str | None) -> torch.dtype | None:
    """float32, float16, bfloat16 or float64; None and "keep" mean every tensor's own."""
    if text in (None, "keep"):
        return None
    names = ("float32", "float16", "bfloat16", "float64")
    return {name: ELEMENT_TYPES[name] for name in names}[str(text)].dtype
