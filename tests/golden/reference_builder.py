"""A golden case's reference in the making, in the product's own format: what every family's table writes into."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from golden_case import Case

from weightport.parity import Selection, write_reference
from weightport.parity.reference import FLOAT64_SUFFIX
from weightport.parity.selection import parse_selection


@dataclass
class Builder:
    """A reference file in the making."""

    case: Case
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    slices: dict[str, Selection] = field(default_factory=dict)

    def run(self, name: str, kind: str, inputs: dict[str, torch.Tensor], **options: Any) -> None:
        """Open a run, once."""
        if name not in self.runs:
            self.runs[name] = {"kind": kind, "options": options}
            self.tensors |= {f"{name}/in/{argument}": tensor.clone() for argument, tensor in inputs.items()}

    def expect(self, run: str, seam: str, value: torch.Tensor, f64: bool, kept: list[Any] | None = None) -> None:
        """A seam of the original; `kept` is what part of it, as JSON has a selection."""
        key = f"{run}/out/{seam}{FLOAT64_SUFFIX if f64 else ''}"
        self.tensors[key] = value.clone()
        if kept is not None:
            self.slices[key] = parse_selection(kept)

    def write(self, path: Path, kinds: Collection[str]) -> Path:
        """The file, of the runs of `kinds`."""
        runs = {name: run for name, run in self.runs.items() if run["kind"] in kinds}
        tensors = {key: tensor for key, tensor in self.tensors.items() if key.partition("/")[0] in runs}
        slices = {key: selection for key, selection in self.slices.items() if key in tensors}
        return write_reference(path, self.case.family, self.case.spec.get("source", {}), runs, tensors, slices)
