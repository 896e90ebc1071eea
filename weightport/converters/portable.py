"""A model's code beside its weights, for environments with transformers but without weightport."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

# Per family: config.json's auto_map, and the files that the named classes live in.
AUTO_MAPS = {
    "ofa": {
        "config.json": {
            "AutoConfig": "configuration_ofa.OFAConfig",
            "AutoModel": "modeling_ofa.OFAModel",
            "AutoModelForImageTextToText": "modeling_ofa.OFAForConditionalGeneration",
        },
        "preprocessor_config.json": {
            "AutoImageProcessor": "image_processing_ofa.OFAImageProcessor",
            "AutoProcessor": "processing_ofa.OFAProcessor",
        },
        "processor_config.json": {
            "AutoImageProcessor": "image_processing_ofa.OFAImageProcessor",
            "AutoProcessor": "processing_ofa.OFAProcessor",
        },
    },
}


def write_portable_code(folder: Path, family: str) -> None:
    """Copy the family's modeling, configuration and processing files into `folder` and name them in the auto_maps."""
    for source in files("weightport.modeling").joinpath(family).iterdir():
        if source.name.endswith(".py") and source.name != "__init__.py":
            (folder / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    for name, auto_map in AUTO_MAPS[family].items():
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["auto_map"] = auto_map
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
