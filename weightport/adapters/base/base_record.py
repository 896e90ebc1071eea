"""base.json beside an adapter: the SHA-256 of the weights it was trained on, so that a merge meets no other base, and
which layers were held in 4 bits while it was trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightport.checkpoints import open_checkpoint
from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import CheckpointError
from weightport.hashing import BackgroundDigests

FILE = "base.json"


@dataclass(frozen=True)
class Quantization:
    """How a training held its base: `kind` "nf4" or "nf4-double", `layers` the names of the modules in 4 bits."""

    kind: str
    layers: frozenset[str]


def record_base(adapter: str | Path, base: str | Path, quantization: Quantization | None = None) -> None:
    """Write into the folder `adapter` which weight files of the model directory `base` it belongs to, and how it saw
    them."""
    checkpoint = open_checkpoint(base)
    files = [file for file in checkpoint.files if file.suffix != ".json"]
    with BackgroundDigests(files) as digests:
        found = [asdict(digest) for digest in digests.result(checkpoint.states)]
    content: dict[str, Any] = {"format": 1, "files": found}
    if quantization is not None:
        content["quantization"] = {"kind": quantization.kind, "layers": sorted(quantization.layers)}
    (Path(adapter) / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def recorded_base(adapter: Path) -> set[str] | None:
    """The SHA-256 of every weight file of the adapter's base; None when nothing is recorded. Raises
    CheckpointError."""
    path = adapter / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, dict) and "sha256" in file for file in files):
        raise CheckpointError(f"{path} is not a record of a base: it has no files with their sha256.")
    return {str(file["sha256"]) for file in files}


def recorded_quantization(adapter: Path) -> Quantization | None:
    """How the adapter's training held its base; None when nothing is recorded. Raises CheckpointError."""
    path = adapter / FILE
    content = read_json(path) if path.is_file() else None
    found = content.get("quantization") if isinstance(content, dict) else None
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("layers"), list):
        raise CheckpointError(f"{path} is not a record of a base: its quantization names no layers.")
    return Quantization(str(found.get("kind")), frozenset(map(str, found["layers"])))
