"""A model's code beside its weights, for environments with transformers but without weightport."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AutoMap:
    """Where `trust_remote_code` finds a class: an `auto_map` entry of a settings file, or of an object inside it.

    `architectures`: the entry is for models whose config.json names one of them; empty for every model of the family.
    """

    file: str
    within: str | None
    auto_class: str
    reference: str
    architectures: tuple[str, ...] = ()


def entries_for(config: Mapping[str, Any], entries: Sequence[AutoMap]) -> tuple[AutoMap, ...]:
    """The entries that a model of this config.json needs; none where transformers has its class."""
    own = set(config.get("architectures") or ())
    return tuple(entry for entry in entries if not entry.architectures or own & set(entry.architectures))


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
