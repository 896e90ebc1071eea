"""A folder as the Hub and `save_pretrained` lay it out: weights under a conventional name, JSON files beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightport.checkpoints.formats.sharded import read_json
from weightport.checkpoints.shown import shown
from weightport.checkpoints.types import Checkpoint
from weightport.errors import CheckpointError

# In the order of preference: safetensors before pickles, an index before a single file.
_CONVENTIONAL = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"})
# What trainers leave beside the weights.
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "training_args", "rng_state", "random_states")
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)


def open_folder(folder: Path, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The one checkpoint of `folder`.

    A training checkpoint of fairseq, or a lone file that is not named as the Hub names weights and has no JSON files
    beside it, gives exactly what it gives when it is opened itself. Else `document` has the parsed config.json under
    "config" (and so on for the other JSON files of a model directory, each by its name without .json) and the weight
    file's own document under "weights".
    """
    weights = _weights(folder)
    opened = open_file(weights)
    beside = [name for name in _COMPANIONS if (folder / name).exists()]
    unconventional = weights.name not in _CONVENTIONAL and not _is_index(weights.name)
    if _explains_itself(opened.document) or (unconventional and not beside):
        # A trainer's checkpoint that stands in a folder of its own: it says itself how its model was built.
        return opened
    document: dict[str, Any] = {name.removesuffix(".json"): read_json(folder / name) for name in beside}
    return replace(opened, path=folder, document={**document, "weights": opened.document})


def _explains_itself(document: Any) -> bool:
    """Whether a trainer's checkpoint says how its model was built: a model beside its options, as fairseq saves it."""
    options = ("args", "cfg")
    return isinstance(document, dict) and "model" in document and any(document.get(key) is not None for key in options)


def _is_index(name: str) -> bool:
    return name.endswith((".safetensors.index.json", ".bin.index.json"))


def _is_stale(folder: Path, name: str, names: list[str]) -> bool:
    """Whether `name` is an index left from before the weights were saved again as the single file beside it."""
    single = name.removesuffix(".index.json")
    if single == name or single not in names:
        return False
    content = read_json(folder / name)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    return isinstance(weight_map, dict) and not set(map(str, weight_map.values())) <= set(names)


def _weights(folder: Path) -> Path:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}).") from error
    for name in _CONVENTIONAL:
        if name in names and not _is_stale(folder, name, names):
            return folder / name
    candidates = [
        name for name in names if Path(name).suffix in _WEIGHT_SUFFIXES and not name.startswith(_NOT_WEIGHTS)
    ]
    indices = [name for name in names if _is_index(name)]
    if len(indices or candidates) == 1:
        return folder / (indices or candidates)[0]
    if any("-of-" in name for name in candidates):
        raise CheckpointError(
            f"{folder}: holds shards ({shown(tuple(candidates))}) without their index, which is usually named "
            "model.safetensors.index.json. Download the whole folder."
        )
    if candidates:
        raise CheckpointError(
            f"{folder}: holds {len(candidates)} weight files, and none of a conventional name: "
            f"{', '.join(candidates)}. Name the one that you mean."
        )
    if ".zarray" in names:
        raise CheckpointError(f"{folder}: is one array of a trainer's checkpoint. Name the folder that it stands in.")
    if any(name in names for name in ("manifest.ocdbt", "ocdbt.process_0", "_CHECKPOINT_METADATA", "zarr.json")):
        raise CheckpointError(
            f"{folder}: is a checkpoint of Orbax (OCDBT or zarr 3). Restore it with Orbax, and save the parameters as "
            ".npz: numpy.savez(file, **{'params/' + name: array}), names joined with slashes."
        )
    raise CheckpointError(
        f"{folder}: holds no weights. Expected {_CONVENTIONAL[1]}, {_CONVENTIONAL[3]}, their index files, or one file "
        f"ending in {', '.join(sorted(_WEIGHT_SUFFIXES))}; found "
        f"{shown(tuple(names)) if names else 'an empty folder'}."
    )
