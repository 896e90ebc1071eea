"""safetensors: eight bytes of header length, a JSON header, and tensors that fill the rest of the file exactly."""

from __future__ import annotations

import struct
from typing import Any

from weightport.checkpoints.dtypes import SAFETENSORS_TYPES
from weightport.checkpoints.json_text import parse_json
from weightport.checkpoints.layout import Layout, Span, StoredTensor
from weightport.checkpoints.naming import tensor_name
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.checkpoints.types import Checkpoint, TensorRef
from weightport.errors import CheckpointError

# The limit of the safetensors library itself.
MAX_HEADER = 100_000_000


def open_safetensors(file: SourceFile) -> Checkpoint:
    """The checkpoint in one safetensors file, its tensors in the order of their bytes. Only the header is read.

    `document` is {"metadata": the header's __metadata__}. Raises CheckpointError unless every byte after the header
    belongs to exactly one tensor.
    """
    (length,) = struct.unpack("<Q", file.read(0, 8, "the safetensors header's length"))
    if length > MAX_HEADER:
        raise CheckpointError(f"{file.path}: claims a safetensors header of {length} bytes; at most {MAX_HEADER} are.")
    header = _parse_header(file, file.read(8, length, "the safetensors header"))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: its __metadata__ should map text to text.")
    start = 8 + length
    entries = sorted((_entry(file, name, entry) for name, entry in header.items()), key=lambda entry: entry[2])
    end = 0
    tensors: dict[str, TensorRef] = {}
    for name, layout, (first, last) in entries:
        if first != end:
            relation = (
                "overlaps what comes before it" if first < end else f"leaves {first - end} bytes unused before it"
            )
            raise CheckpointError(f"{file.path}: {shown(name)} at bytes {first} to {last} {relation}.")
        end = last
        source = Span(file, start + first, last - first)
        if name in tensors:
            raise CheckpointError(f"{file.path}: holds two tensors that would both be named {shown(name)}.")
        storage = (str(file.path), name, 0, layout.stride)
        tensors[name] = TensorRef(name, layout.shape, layout.element, StoredTensor(layout, source), storage)
    if start + end != file.size:
        raise CheckpointError(
            f"{file.path}: its tensors end at byte {start + end}, but the file has {file.size}. "
            "It is truncated or damaged; fetch it again."
        )
    states = {file.path: file.state}
    return Checkpoint(file.path, "safetensors", (file.path,), tensors, {"metadata": metadata}, states)


def _parse_header(file: SourceFile, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw, refuse_duplicates=True)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: its safetensors header is malformed ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: its safetensors header should be a JSON object.")
    return header


def _entry(file: SourceFile, name: str, entry: Any) -> tuple[str, Layout, tuple[int, int]]:
    where = f"{file.path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} should have dtype, shape and data_offsets in the header.")
    element = SAFETENSORS_TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if element is None:
        raise CheckpointError(
            f"{where} has dtype {shown(entry['dtype'])}; known are {', '.join(sorted(SAFETENSORS_TYPES))}."
        )
    if not _whole(entry["shape"]) or not _whole(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{where} has a shape or data_offsets that are not whole numbers.")
    first, last = entry["data_offsets"]
    try:
        name = tensor_name(name)
        layout = Layout.contiguous(element, tuple(entry["shape"]))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if last - first != layout.count * element.itemsize:
        raise CheckpointError(
            f"{where} has shape {shown(layout.shape)} and dtype {entry['dtype']}, which take "
            f"{layout.count * element.itemsize} bytes, but stands at bytes {first} to {last}."
        )
    return name, layout, (first, last)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
