"""Telling a model directory from what else a user may name in its place."""

from __future__ import annotations

from pathlib import Path

from weightport.errors import CheckpointError


def check_model_directory(directory: Path) -> None:
    """Raise CheckpointError, saying what to do, for what is not there, an adapter, or has no config.json."""
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist.")
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} is an adapter, not a model directory: merge it first (port-merge-lora BASE {directory} OUT)."
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a model directory: it has no config.json. Expected what a conversion wrote "
            "(`weightport convert`)."
        )


def check_processor(directory: Path) -> None:
    """Raise CheckpointError when a model directory was written without its processor."""
    if not (directory / "processor_config.json").is_file():
        raise CheckpointError(
            f"{directory} has no processor (processor_config.json), so text cannot be read or written.\n"
            "  Convert the checkpoint again with --vocab to write one."
        )
