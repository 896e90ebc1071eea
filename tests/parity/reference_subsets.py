"""Reference files that hold some runs of another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weightport.parity import read_reference, write_reference


def subset(whole: Path, path: Path) -> Callable[..., Path]:
    """Writes some runs of a reference file to `path`."""

    def write(*names: str, change: Callable[..., None] = lambda runs, tensors, slices: None) -> Path:
        opened = read_reference(whole)
        chosen = [run for run in opened.runs if run.name in names]
        assert len(chosen) == len(names)
        runs = {run.name: {"kind": run.kind, "options": dict(run.options)} for run in chosen}
        tensors = {ref.name: ref.read() for run in chosen for ref in run.inputs.values()}
        tensors |= {each.tensor.name: each.tensor.read() for run in chosen for each in run.outputs}
        slices = {each.tensor.name: each.selection for run in chosen for each in run.outputs if each.selection.given}
        change(runs, tensors, slices)
        return write_reference(path, opened.family, opened.source, runs, tensors, slices)

    return write
