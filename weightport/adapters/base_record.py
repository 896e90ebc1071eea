"""base.json beside an adapter: the SHA-256 of the weights it was trained on, so that a merge meets no other base."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..checkpoints import open_checkpoint
from ..checkpoints.sharded import read_json
from ..errors import CheckpointError
from ..hashing import BackgroundDigests

FILE = "base.json"


def record_base(adapter: str | Path, base: str | Path) -> None:
    """Write into the folder `adapter` which weight files of the model directory `base` it belongs to."""
    files = [file for file in open_checkpoint(base).files if file.suffix != ".json"]
    with BackgroundDigests(files) as digests:
        found = [asdict(digest) for digest in digests.result()]
    (Path(adapter) / FILE).write_text(json.dumps({"format": 1, "files": found}, indent=1) + "\n", encoding="utf-8")


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
