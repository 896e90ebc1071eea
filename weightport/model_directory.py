"""Telling a converted model directory from what else a user may name in its place."""

from __future__ import annotations

from pathlib import Path

from weightport.checkpoints import open_checkpoint
from weightport.errors import CheckpointError


def check_converted(directory: Path) -> None:
    """Raise CheckpointError, saying what to do, unless `directory` can be a native model: it is not there, an adapter,
    an original checkpoint that is not converted yet, or has no config.json. No weights are read.
    """
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist.")
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} is an adapter, not a model directory: merge it first (port-merge-lora BASE {directory} OUT)."
        )
    family = original_family(directory)
    if family is not None:
        name, title = family
        raise CheckpointError(
            f"{directory} holds an original checkpoint of {title}, not a converted one. Convert it first: "
            f"port-{name} {directory} OUT"
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


def original_family(path: Path) -> tuple[str, str] | None:
    """(name, title) of the family of an original checkpoint; None for anything else."""
    from weightport.families import FAMILIES

    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return None
    return next(((f.name, f.title) for f in FAMILIES.values() if f.recognises(checkpoint)), None)
