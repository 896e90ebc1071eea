"""Golden cases of a folder, found by their case.json; what stands in one, rebuilt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import golden
import torch
from safetensors import safe_open

LARGE_BYTES = 400_000_000
_SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


@dataclass(frozen=True)
class Case:
    """One folder with a case.json. `name` is its path below the folder of cases."""

    path: Path
    name: str

    @cached_property
    def spec(self) -> dict[str, Any]:
        return json.loads((self.path / "case.json").read_text(encoding="utf-8"))

    @property
    def family(self) -> str:
        return str(self.spec.get("family"))

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        return self.spec.get("checkpoints") or []

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter that the reference was computed with, beside the base's files; None without
        one."""
        return self.spec.get("adapter")

    @property
    def nbytes(self) -> int:
        """Bytes of its checkpoint files' tensors."""
        entries = [
            entry
            for checkpoint in self.checkpoints
            for entry in (checkpoint.get("storages") or checkpoint.get("tensors") or {}).values()
        ]
        return sum(prod(entry.get("shape", ())) * _SIZES.get(entry.get("dtype", ""), 1) for entry in entries)

    @property
    def large(self) -> bool:
        return self.nbytes > LARGE_BYTES

    @cached_property
    def texts(self) -> dict[str, str]:
        """What every tensor of the reference is, in words."""
        reference = self.spec.get("reference", {})
        return dict(reference.get("tensors") or self.spec.get("tensors") or reference)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The original's inputs and outputs."""
        path = self.path / "reference.safetensors"
        if not path.is_file():
            return {}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping

    @cached_property
    def tensor_names(self) -> list[str]:
        """The names of `tensors`, without reading them."""
        path = self.path / "reference.safetensors"
        if not path.is_file():
            return []
        with safe_open(path, "pt") as file:
            return list(file.keys())

    def data(self, file: str) -> Any:
        """A JSON file of the case, None when it has none of that name."""
        path = self.path / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def materialize(self, out: Path) -> Path:
        """Rebuild the original's files in `out`; the (first) checkpoint."""
        return golden.materialize(self.path, out)


def sources_of(case: Case, table: ModuleType, checkpoint: Path) -> dict[str, Path]:
    """The source files of a rebuilt case by the names that a conversion gives them; `checkpoint` is the first one
    rebuilt, and the only one unless the family's table says otherwise."""
    of_several = getattr(table, "sources", None)
    return {"checkpoint": checkpoint} if of_several is None else of_several(case, checkpoint)


def find_cases(folder: Path) -> list[Case]:
    """Every case below `folder`, at any depth, by name."""
    return [
        Case(path.parent, path.parent.relative_to(folder).as_posix() if path.parent != folder else folder.name)
        for path in sorted(folder.rglob("case.json"))
    ]
