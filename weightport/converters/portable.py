"""A model's code beside its weights, for environments with transformers but without weightport."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from weightport.writing import own_file


@dataclass(frozen=True)
class AutoMap:
    """Where `trust_remote_code` finds a class: an `auto_map` entry of a settings file, or of an object inside it."""

    file: str
    within: str | None
    auto_class: str
    reference: str


AUTO_MAPS = {
    "ofa": (
        AutoMap("config.json", None, "AutoConfig", "configuration_ofa.OFAConfig"),
        AutoMap("config.json", None, "AutoModel", "modeling_ofa.OFAModel"),
        AutoMap("config.json", None, "AutoModelForImageTextToText", "modeling_ofa.OFAForConditionalGeneration"),
        AutoMap("config.json", None, "AutoModelForSeq2SeqLM", "modeling_ofa.OFAForConditionalGeneration"),
        AutoMap("processor_config.json", None, "AutoProcessor", "processing_ofa.OFAProcessor"),
        AutoMap(
            "processor_config.json", "image_processor", "AutoImageProcessor", "image_processing_ofa.OFAImageProcessor"
        ),
    ),
}


def write_portable_code(folder: Path, family: str) -> None:
    """Copy the family's modeling, configuration and processing files into `folder` and name them in the auto_maps."""
    for source in files("weightport.modeling").joinpath(family).iterdir():
        if source.name.endswith(".py") and source.name != "__init__.py":
            with own_file(folder / source.name) as work:
                work.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    for entry in AUTO_MAPS[family]:
        path = folder / entry.file
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            owner = settings if entry.within is None else settings[entry.within]
            owner.setdefault("auto_map", {})[entry.auto_class] = entry.reference
            with own_file(path) as work:
                work.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
