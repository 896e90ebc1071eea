"""The model directory that an adapter belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightport.checkpoints import Checkpoint, open_checkpoint
from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class Base:
    """The model directory to merge into."""

    path: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))


def open_base(base: Path) -> Base:
    """The model directory to merge into. Raises CheckpointError, ConfigurationError for a quantised one."""
    if not base.is_dir() or not (base / "config.json").is_file():
        raise CheckpointError(
            f"{base} is not a model directory: expected a folder with config.json and weights, as a conversion or "
            "save_pretrained wrote it."
        )
    if (base / "adapter_config.json").is_file() and not any(base.glob("model*.safetensors")):
        raise CheckpointError(f"{base} is an adapter. The base comes first: port-merge-lora BASE ADAPTER OUT.")
    config = read_json(base / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{base / 'config.json'} should hold a JSON object.")
    if config.get("quantization_config"):
        raise ConfigurationError(
            f"{base} holds quantised weights (quantization_config in config.json). Merge into the unquantised model; "
            "--quantized-base nf4 rounds it to the values that a 4-bit training saw."
        )
    checkpoint = open_checkpoint(base)
    return Base(base, checkpoint, config)
