"""Streams a plan into safetensors shards, tensor by tensor: no state dict is ever built.

All names, shapes and dtypes are known beforehand, so a shard's header is written first and the values follow in one
sequential pass. Memory is bounded by one chunk of one tensor; every value is checked for NaN and infinity on its way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weightport.checkpoints import TensorRef
from weightport.converters.plan import Plan, Step, TensorSpec
from weightport.errors import CoverageError, NonFiniteError
from weightport.writing.hashed_file import HashedFile

CHUNK_BYTES = 16 << 20

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
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its size in bytes and the SHA-256 of what was written."""

    file: str
    size: int
    sha256: str


def lay_out(plan: Plan, max_shard_bytes: int) -> tuple[Shard, ...]:
    """The plan's targets in shards of at most `max_shard_bytes` (a larger tensor gets a shard of its own)."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in plan.targets:
        if groups[-1] and size + spec.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    # Wide elements first keeps every tensor aligned to its own element size.
    return tuple(
        Shard(name, tuple(sorted(group, key=lambda spec: -spec.dtype.itemsize))) for name, group in zip(names, groups)
    )


def write_shards(
    plan: Plan,
    shards: Sequence[Shard],
    folder: Path,
    *,
    allow_nonfinite: bool = False,
    advance: Advance = lambda count: None,
) -> tuple[WrittenFile, ...]:
    """Write every shard, and the index when there are several. Returns the files with their hashes.

    Raises NonFiniteError naming the first tensor that holds NaN or infinity, CoverageError when tied copies differ.
    """
    steps = {spec.name: step for step in plan.steps for spec in step.targets}
    files = tuple(_write_shard(shard, steps, folder, allow_nonfinite, advance) for shard in shards)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": plan.nbytes, "total_parameters": plan.parameters},
            "weight_map": {spec.name: shard.file for shard in shards for spec in shard.tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_shard(
    shard: Shard, steps: dict[str, Step], folder: Path, allow_nonfinite: bool, advance: Advance
) -> WrittenFile:
    with HashedFile(folder / shard.file) as out:
        out.write(safetensors_header(shard.tensors))
        for spec in shard.tensors:
            step = steps[spec.name]
            _check_ties(step)
            place = step.targets.index(spec)
            source = ", ".join(ref.name for ref in step.sources) or spec.name
            values = (
                stored_chunks(step.sources[0], spec.dtype)
                if step.copies
                else chunks(step.produce()[place], spec.dtype)
            )
            for chunk in values:
                if not allow_nonfinite:
                    check_finite(chunk, spec.name, source)
                out.write(as_bytes(chunk))
                advance(chunk.numel() * chunk.element_size())
    return WrittenFile(shard.file, out.size, out.sha256)


def safetensors_header(tensors: Sequence[TensorSpec]) -> bytes:
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


def chunks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """`tensor` in `dtype`, contiguous, in row blocks of about CHUNK_BYTES: views where nothing changes."""
    if tensor.ndim == 0 or tensor.numel() == 0 or tensor.is_contiguous():
        flat = tensor.reshape(-1)
        step = max(1, CHUNK_BYTES // dtype.itemsize)
        for start in range(0, flat.numel(), step):
            yield flat[start : start + step].to(dtype)
        return
    row = max(1, tensor[0].numel() * dtype.itemsize)
    step = max(1, CHUNK_BYTES // row)
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step].to(dtype).contiguous()


def stored_chunks(ref: TensorRef, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The values of a stored tensor in `dtype`, flat, about CHUNK_BYTES at a time: never all of them in memory."""
    for piece in ref.pieces(CHUNK_BYTES):
        yield piece.to(dtype)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


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


def _check_ties(step: Step) -> None:
    """Tied copies must be equal bit for bit: only then does writing one of them lose nothing."""
    for alias in step.aliases:
        first = step.sources[0]
        if alias.storage and alias.storage == first.storage:
            continue
        if not same_stored_bits(first, alias):
            raise CoverageError(
                f"{alias.name} and {first.name} are one matrix in the model, but the checkpoint holds different "
                "values for them. Converting would lose one of the two."
            )


def same_stored_bits(a: TensorRef, b: TensorRef) -> bool:
    """As `same_bits`, of stored tensors: never all of their values in memory."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(same_bits(x, y) for x, y in zip(a.pieces(CHUNK_BYTES), b.pieces(CHUNK_BYTES)))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (NaN equals itself), compared chunk by chunk."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = (
        zip(chunks(a, a.dtype), chunks(b, b.dtype))
        if a.is_contiguous() == b.is_contiguous()
        else ((a.contiguous(), b.contiguous()),)
    )
    return all(torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in pairs)
