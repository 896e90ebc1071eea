"""Streams tensors into safetensors files, one by one: no state dict is ever built.

All names, shapes and dtypes are known beforehand, so a shard's header is written first and the values follow in one
sequential pass. Memory is bounded by one chunk of one tensor; every value is checked for NaN and infinity on its way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.checkpoints.layout import raw_bytes
from weightport.errors import NonFiniteError
from weightport.writing.hashed_file import HashedFile
from weightport.writing.outgoing import Outgoing

SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

Advance = Callable[[int], None]
"""Called with the number of bytes just written."""


@dataclass(frozen=True)
class Shard:
    """One output file: its name and the tensors in it, in file order."""

    file: str
    tensors: tuple[Outgoing, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its size in bytes and the SHA-256 of what was written."""

    file: str
    size: int
    sha256: str


def lay_out(tensors: Iterable[Outgoing], max_shard_bytes: int, stem: str = "model") -> tuple[Shard, ...]:
    """The tensors in shards of at most `max_shard_bytes` (a larger tensor gets a shard of its own)."""
    groups: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return tuple(Shard(name, tuple(aligned(group))) for name, group in zip(names, groups))


def aligned(tensors: Iterable[Outgoing]) -> list[Outgoing]:
    """The tensors, wide elements first: every one begins at a multiple of its own element size."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def write_shards(
    shards: Sequence[Shard],
    folder: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = True,
    advance: Advance = lambda count: None,
) -> tuple[WrittenFile, ...]:
    """Write every shard, and the index (with `metadata`) when there are several. Returns the files with their hashes.

    Raises NonFiniteError naming the first tensor that holds NaN or infinity, unless they are allowed.
    """
    files = tuple(
        write_safetensors(shard.tensors, folder / shard.file, allow_nonfinite=allow_nonfinite, advance=advance)
        for shard in shards
    )
    if len(shards) > 1:
        names = {shard.file: [tensor.name for tensor in shard.tensors] for shard in shards}
        write_index(folder, names, sum(shard.nbytes for shard in shards), metadata or {})
    return files


def write_index(
    folder: Path, names: Mapping[str, Sequence[str]], total_bytes: int, metadata: Mapping[str, Any]
) -> None:
    """Write the index of shards: which of the files holds which tensor (`names`, by file)."""
    index = {
        "metadata": {**metadata, "total_size": total_bytes},
        "weight_map": {name: file for file, held in names.items() for name in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    tensors: Sequence[Outgoing],
    path: Path,
    *,
    allow_nonfinite: bool = True,
    advance: Advance = lambda count: None,
    watch: Callable[[memoryview], None] | None = None,
) -> WrittenFile:
    """Write one file with `tensors` in this order; what is stored once and named twice is written under each name.
    `watch`: see HashedFile."""
    with HashedFile(path, watch) as out:
        out.write(safetensors_header(tensors))
        for tensor in tensors:
            for block in tensor.blocks():
                if not allow_nonfinite:
                    check_finite(block, tensor.name, tensor.origin or tensor.name)
                out.write(as_bytes(block))
                advance(block.numel() * block.element_size())
    return WrittenFile(path.name, out.size, out.sha256)


def safetensors_header(tensors: Sequence[Outgoing]) -> bytes:
    """The length-prefixed JSON header of a safetensors file that holds `tensors` in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in tensors:
        header[spec.name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(raw_bytes(tensor).numpy())  # type: ignore[arg-type]


def check_finite(tensor: torch.Tensor, name: str, source: str) -> None:
    """Raise NonFiniteError when a floating-point tensor holds NaN or infinity."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{source} holds NaN or infinity ({bad} of {tensor.numel()} values checked for {name}).\n"
            "  A training run that diverged, or a dtype too narrow for the values, leaves such weights. Take an "
            "earlier checkpoint, a wider --dtype, or pass --allow-nonfinite to keep them."
        )
