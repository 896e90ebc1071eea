"""Weights spread over several files, with an index that says which file holds which tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightport.checkpoints.json_text import parse_json
from weightport.checkpoints.shown import printable, shown
from weightport.checkpoints.source_file import SourceFile
from weightport.checkpoints.types import Checkpoint, TensorRef
from weightport.errors import CheckpointError

_MAX_JSON = 100_000_000
# Of a file name, on every file system.
_MAX_NAME = 255


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises CheckpointError for one that is missing or malformed."""
    return _json_of(SourceFile(path))


def _json_of(file: SourceFile) -> Any:
    path = file.path
    if file.size > _MAX_JSON:
        raise CheckpointError(f"{path}: is a JSON file of {file.size} bytes; none of these is so large.")
    try:
        return parse_json(file.read(0, file.size, "its text"))
    except ValueError as error:
        raise CheckpointError(f"{path}: should be a JSON file, but cannot be read as one ({error}).") from error


def open_sharded(index: Path, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The checkpoint that the index file (`model.safetensors.index.json` and its like) describes.

    Tensors are in the order of the shards' names, and within a shard in file order; `document` is {"metadata": the
    index's metadata}. Raises CheckpointError unless the shards hold exactly the tensors that the index promises.
    """
    file = SourceFile(index)
    content = _json_of(file)
    promised = _weight_map(index, content)
    shard_names = sorted(set(promised.values()))
    folder = index.parent
    missing = [name for name in shard_names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(shard_names)} shards, of which {len(missing)} are not beside it: "
            f"{shown(tuple(missing))}. Download the whole folder."
        )
    shards = {name: open_file(folder / name) for name in shard_names}
    expected: dict[str, set[str]] = {name: set() for name in shard_names}
    for tensor, place in promised.items():
        expected[place].add(printable(tensor))
    tensors: dict[str, TensorRef] = {}
    for name, shard in shards.items():
        _require_same(index, name, expected[name], set(shard.tensors))
        tensors.update(shard.tensors)
    formats = {shard.format for shard in shards.values()}
    form = "safetensors-sharded" if formats == {"safetensors"} else "torch-sharded"
    files = (index, *(folder / name for name in shard_names))
    states = {index: file.state}
    for shard in shards.values():
        states.update(shard.states)
    return Checkpoint(index, form, files, tensors, {"metadata": content.get("metadata", {})}, states)


def _weight_map(index: Path, content: Any) -> dict[str, str]:
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: is JSON, but no index of a sharded checkpoint: it has no weight_map. Name the weights "
            "themselves, or their folder."
        )
    for tensor, name in weight_map.items():
        # A name that leads out of the folder would make us read, and publish, another file.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise CheckpointError(
                f"{index}: {shown(tensor)} should be in a file beside the index, but is said to be in {shown(name)}."
            )
        if len(name.encode("utf-8")) > _MAX_NAME:
            raise CheckpointError(
                f"{index}: {shown(tensor)} is said to be in {shown(name, 40)}, a file name of {len(name)} characters; "
                f"the longest have {_MAX_NAME}."
            )
    return weight_map


def _require_same(index: Path, shard: str, expected: set[str], found: set[str]) -> None:
    for names, problem in ((expected - found, "lacks"), (found - expected, "also holds")):
        if names:
            raise CheckpointError(
                f"{index}: its shard {shard} {problem} {len(names)} tensors, against the index: "
                f"{shown(tuple(sorted(names)))}. The files are of different versions; download them together."
            )
