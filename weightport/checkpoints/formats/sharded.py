"""Weights spread over several files, with an index that says which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightport.checkpoints.mapped_file import require_file, shown
from weightport.checkpoints.types import Checkpoint, TensorRef
from weightport.errors import CheckpointError

_MAX_JSON = 200_000_000


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises CheckpointError for one that is missing or malformed."""
    require_file(path)
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path}: is a JSON file of {path.stat().st_size} bytes; none of these is so large.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: should be a JSON file, but cannot be read as one ({error}).") from error


def open_sharded(index: Path, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The checkpoint that the index file (`model.safetensors.index.json` and its like) describes.

    Tensors are in the order of the shards' names, and within a shard in file order; `document` is {"metadata": the
    index's metadata}. Raises CheckpointError unless the shards hold exactly the tensors that the index promises.
    """
    promised = _weight_map(index)
    shard_names = sorted(set(promised.values()))
    folder = index.parent
    missing = [name for name in shard_names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(shard_names)} shards, of which {len(missing)} are not beside it: "
            f"{shown(tuple(missing))}. Download the whole folder."
        )
    shards = {name: open_file(folder / name) for name in shard_names}
    tensors: dict[str, TensorRef] = {}
    for name, shard in shards.items():
        expected = {tensor for tensor, place in promised.items() if place == name}
        _require_same(index, name, expected, set(shard.tensors))
        tensors.update(shard.tensors)
    formats = {shard.format for shard in shards.values()}
    form = "safetensors-sharded" if formats == {"safetensors"} else "torch-sharded"
    files = (index, *(folder / name for name in shard_names))
    return Checkpoint(index, form, files, tensors, {"metadata": read_json(index).get("metadata", {})})


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
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
    return weight_map


def _require_same(index: Path, shard: str, expected: set[str], found: set[str]) -> None:
    for names, problem in ((expected - found, "lacks"), (found - expected, "also holds")):
        if names:
            raise CheckpointError(
                f"{index}: its shard {shard} {problem} {len(names)} tensors, against the index: "
                f"{shown(tuple(sorted(names)))}. The files are of different versions; download them together."
            )
