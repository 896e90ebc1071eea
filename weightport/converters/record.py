"""conversion.json: what was read, what was done to it, and what it takes to go back."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weightport import __version__
from weightport.checkpoints import Checkpoint
from weightport.checkpoints.hashing import FileDigest
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan, main_dtype
from weightport.errors import CheckpointError
from weightport.writing import own_file
from weightport.writing.safetensors_shards import WrittenFile

FILE = "conversion.json"
FORMAT = 1


def conversion_record(
    checkpoint: Checkpoint,
    model: SourceModel,
    plan: Plan,
    files: Sequence[WrittenFile],
    digests: Sequence[FileDigest],
) -> dict[str, Any]:
    """The record of one conversion, as plain data."""
    return {
        "format": FORMAT,
        "family": model.family,
        "layout": model.layout,
        "title": model.title,
        "source": {
            "name": checkpoint.path.name,
            "format": checkpoint.format,
            "files": [asdict(digest) for digest in digests],
            "options": dict(model.options),
        },
        "dtype": _name(main_dtype(plan)),
        "parameters": plan.parameters,
        "files": [asdict(file) for file in files],
        "steps": [
            {
                "operation": step.operation,
                "from": [ref.name for ref in step.sources],
                **({"tied": [ref.name for ref in step.aliases]} if step.aliases else {}),
                "to": [spec.name for spec in step.targets],
            }
            for step in plan.steps
        ],
        "dropped": [
            {
                "name": item.ref.name,
                "shape": list(item.ref.shape),
                "dtype": _name(item.ref.dtype),
                "because": item.because,
            }
            for item in plan.dropped
        ],
        "source_tensors": {name: _name(ref.dtype) for name, ref in model.tensors.items()},
        "notes": list(model.notes),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "weightport": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy")},
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `record` into `folder`."""
    (folder / FILE).write_text(_text(record), encoding="utf-8")


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def link_parity(folder: Path, passed: bool, verdict: str, files: Mapping[str, Path]) -> None:
    """Note in a directory's record what a parity check found, and where its reports stand; nothing without either."""
    record = read_record(folder)
    if record is None or not files:
        return
    links = {kind: os.path.relpath(file, folder) for kind, file in files.items()}
    record["parity"] = {"passed": passed, "verdict": verdict, **links}
    with own_file(folder / FILE) as path:
        path.write_text(_text(record), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a converted directory, or None when it has none (re-saved by a trainer, say).

    Raises CheckpointError when it is of a newer format or not a record at all.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(f"{path} has the format {found!r}; this weightport reads format {FORMAT}.")
    return record


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
