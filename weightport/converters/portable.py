"""A model's code beside its weights, for environments with transformers but without weightport."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class AutoMap:
    """Where `trust_remote_code` finds a class: an `auto_map` entry of a settings file, or of an object inside it."""

    file: str
    within: str | None
    auto_class: str
    reference: str


def write_portable_code(folder: Path, package: str, entries: Sequence[AutoMap]) -> None:
    """Copy the modules of `package` (modelling, configuration, processing) into `folder`, and name their classes in
    the settings files' auto_maps."""
    from weightport.writing import own_file

    for source in files(package).iterdir():
        if source.name.endswith(".py") and source.name != "__init__.py":
            with own_file(folder / source.name) as work:
                work.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    for entry in entries:
        path = folder / entry.file
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            owner = settings if entry.within is None else settings[entry.within]
            owner.setdefault("auto_map", {})[entry.auto_class] = entry.reference
            with own_file(path) as work:
                work.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
