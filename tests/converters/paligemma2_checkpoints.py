"""PaliGemma checkpoints of every form, made from the golden cases by what each form is known for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = GOLDEN / "cases" / "paligemma2"
sys.path.insert(0, str(GOLDEN))

import golden  # noqa: E402 - found beside the cases

VOCABULARY = CASES / "tokenizer" / "companions" / "paligemma_tokenizer.model"
Arrays = dict[str, np.ndarray]


def originals(factory: Any) -> Callable[[str], Path]:
    """name → the case's .npz, rebuilt once."""

    @cache
    def get(name: str) -> Path:
        return golden.materialize(CASES / name, factory.mktemp(name))

    return get


def arrays(path: Path) -> Arrays:
    """What is in an .npz, in its order."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def write(path: Path, tensors: Mapping[str, np.ndarray], *, compressed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **tensors)
    return path


def under(prefix: str, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays with another prefix than `params/`."""
    return {prefix + name.removeprefix("params/"): array for name, array in tensors.items()}


def unstacked_text(tensors: Mapping[str, np.ndarray]) -> Arrays:
    """Every text layer with arrays of its own, as flax writes layers that are not scanned."""
    start, found = "params/llm/layers/", {}
    for name, array in tensors.items():
        if name.startswith(start):
            found |= {f"{start}{layer}/{name.removeprefix(start)}": each for layer, each in enumerate(array)}
        else:
            found[name] = array
    return found


def trainer_step(folder: Path, tensors: Mapping[str, np.ndarray], chunks: int = 2) -> Path:
    """A step as the trainer writes it: a zarr array a folder, divided into `chunks` along axis 0 where that goes."""
    for name, array in tensors.items():
        place = folder / name.replace("/", "~")
        place.mkdir(parents=True)
        parts = chunks if array.ndim and array.shape[0] % chunks == 0 else 1
        dtype = "bfloat16" if array.dtype.kind == "V" else array.dtype.str
        chunk = [array.shape[0] // parts, *array.shape[1:]] if array.ndim else []
        described = {"zarr_format": 2, "shape": list(array.shape), "chunks": chunk, "dtype": dtype, "order": "C",
                     "compressor": {"id": "zstd", "level": 1}, "fill_value": None, "filters": None}  # fmt: skip
        (place / ".zarray").write_text(json.dumps(described))
        for number in range(parts):
            part = array[number * chunk[0] : (number + 1) * chunk[0]] if array.ndim else array
            name_of = ".".join(map(str, [number] + [0] * (array.ndim - 1))) if array.ndim else "0"
            (place / name_of).write_bytes(zstandard.compress(part.tobytes(), 1))
    return folder
