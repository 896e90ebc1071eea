"""PaliGemma checkpoints of every form, made from the golden cases by what each form is known for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

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
