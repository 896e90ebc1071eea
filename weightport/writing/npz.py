"""Writes NumPy's .npz as np.savez lays it out, tensor by tensor: no array is ever whole in memory.

Members are stored, never compressed, with 64-bit sizes as np.savez forces them. bfloat16, which NumPy does not have,
is written as two-byte void (`V2`), the form in which JAX projects save it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from weightport.errors import OutputError
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import as_bytes

_DESCRIPTIONS = {
    torch.bool: "|b1",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.bfloat16: "<V2",
}


def write_npz(tensors: Sequence[Outgoing], path: Path, *, advance: Callable[[int], None] = lambda count: None) -> None:
    """Write `tensors` to the file `path` in their order. Raises OutputError for a dtype that an .npz does not hold."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for tensor in tensors:
            description = _DESCRIPTIONS.get(tensor.dtype)
            if description is None:
                raise OutputError(f"{tensor.name} is {tensor.dtype}, which has no equal in an .npz file.")
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as member:
                header = {"descr": description, "fortran_order": False, "shape": tuple(tensor.shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for block in tensor.blocks():
                    member.write(as_bytes(block))
                    advance(block.numel() * block.element_size())
