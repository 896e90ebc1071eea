"""The names that checkpoint formats give to element types, and the torch dtype each one means."""

from __future__ import annotations

import torch


def _known(names: dict[str, str]) -> dict[str, torch.dtype]:
    # Releases of torch differ in the youngest types; a name that this torch lacks stays unknown to the reader too.
    return {name: getattr(torch, dtype) for name, dtype in names.items() if hasattr(torch, dtype)}


# Classes of torch's typed storages, as pickles name them (torch.FloatStorage). Quantized ones have no plain values.
TORCH_STORAGES = _known(
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

# torch dtypes that a pickle may name (torch.bfloat16), by name. Quantized ones are left out as above.
TORCH_DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("q", "bits"))
}

SAFETENSORS_DTYPES = _known(
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
NUMPY_DTYPES = {
    ("b", 1): torch.bool,
    ("u", 1): torch.uint8,
    ("u", 2): torch.uint16,
    ("u", 4): torch.uint32,
    ("u", 8): torch.uint64,
    ("i", 1): torch.int8,
    ("i", 2): torch.int16,
    ("i", 4): torch.int32,
    ("i", 8): torch.int64,
    ("f", 2): torch.float16,
    ("f", 4): torch.float32,
    ("f", 8): torch.float64,
    ("c", 8): torch.complex64,
    ("c", 16): torch.complex128,
    ("V", 2): torch.bfloat16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(text: str | None) -> torch.dtype | None:
    """float32, float16, bfloat16 or float64; None and "keep" mean every tensor's own."""
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    return None if text in (None, "keep") else names[str(text)]
