"""What can be told of a model directory at once: no weight is read, and neither transformers nor a class is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightport.integrity.known_faults import known_faults
from weightport.writing.ownership import read_record, strangers

CONFIG = "config.json"


def noticed(directory: Path) -> dict[str, list[str]]:
    """What can be told of a folder at once: "warning", versions known to be wrong; "changed", files that are not as
    weightport left them by their size and time. Nothing of a folder that is no model's."""
    config = read_object(directory / CONFIG)
    if config is None:
        return {}
    faults = known_faults(config, read_object(directory / "training.json"))
    since = strangers(directory) if read_record(directory) is not None else ()
    return {
        "warning": [each.line for each in faults],
        "changed": [
            f"{each.path} {each.why}; `weightport verify` compares the bytes" for each in since if each.recorded
        ],
    }


def read_object(path: Path) -> Mapping[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
