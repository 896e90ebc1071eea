"""Files of the golden cases, small enough to be written thousands of times."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
LARGE = 1 << 16


@cache
def materialized(name: str, folder: Path) -> Path:
    """The case `name` rebuilt below `folder`: its checkpoint."""
    sys.path.insert(0, str(GOLDEN))
    import golden

    made: Path = golden.materialize(GOLDEN / "cases" / name, folder / name.replace("/", "-"))
    return made


def shrunk(path: Path) -> None:
    """Write a torch checkpoint of a trainer again without its optimizer, and with large tensors as one repeated
    value: names, shapes and options are what a plan is made of."""
    document = torch.load(path, weights_only=False)
    document = {key: value for key, value in document.items() if key in ("model", "args", "cfg", "extra_state")}
    torch.save(_small(document), path)


def _small(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.nbytes > LARGE and value.is_floating_point():
        return torch.zeros(1, dtype=value.dtype).expand(value.shape)
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _small(each) for key, each in value.items()}
    return value
