"""What a directory must be before it is published: complete, consistent, and the bytes that its records speak of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.base.base_model import Base
from weightport.checkpoints import Checkpoint, open_checkpoint
from weightport.checkpoints.formats.sharded import read_json
from weightport.converters.native import loadable_tensors
from weightport.converters.portable import AutoMap, entries_for
from weightport.converters.record import read_record
from weightport.errors import CheckpointError, ConfigurationError, CoverageError
from weightport.hashing import BackgroundDigests
from weightport.integrity.companions import check_companions
from weightport.integrity.file_hashes import require_recorded
from weightport.integrity.findings import Severity
from weightport.integrity.known_faults import known_faults
from weightport.integrity.structure import load_on_meta
from weightport.local_paths import shortened_values
from weightport.release.belonging import RECORDS, belonging, left_out
from weightport.release.family import PublishedFamily

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class CheckedDirectory:
    """A directory that may be published. `published` are the files that belong to the model by their names on the
    Hub, `left_out` what lies there beside them. `dtype` holds most bytes; `hashes` are the weights' SHA-256 and
    `stamps` tell whether they changed since; `records` are its JSON records by file
    name, without paths of this machine; `warnings` say what a reader should know before it is public."""

    path: Path
    config: Mapping[str, Any]
    published: Mapping[str, Path]
    left_out: tuple[str, ...]
    parameters: int
    dtype: torch.dtype
    hashes: Mapping[str, str]
    stamps: Mapping[Path, Stamp]
    records: Mapping[str, Any]
    family: PublishedFamily | None
    warnings: tuple[str, ...] = ()

    @property
    def code(self) -> tuple[AutoMap, ...]:
        """Which modeling code the model needs beside the weights; empty where transformers has its class."""
        return () if self.family is None else entries_for(self.config, self.family.portable)

    @property
    def needs_code(self) -> bool:
        """Whether transformers has no class of its own for the model."""
        return bool(self.code)


def stamp(path: Path) -> Stamp:
    """What changes when a file is written to, replaced or moved in: inode, size, times of content and of status."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def require_unchanged(checked: CheckedDirectory) -> None:
    """Raises CheckpointError when a weight file is no longer the one that was hashed; reads none."""
    for path, before in checked.stamps.items():
        if not path.is_file() or stamp(path) != before:
            raise CheckpointError(
                f"{path} changed while it was released, so that its hash is no longer known. Nothing was published; "
                "run again when nothing writes to it."
            )


def check_directory(
    directory: str | Path, family_of: Callable[[object], PublishedFamily | None], include: Sequence[str] = ()
) -> CheckedDirectory:
    """Check the model directory, reading its weights once for their hashes. `include`: further files to publish.

    `family_of` gives the family of a model_type, None for a model of another. Raises CheckpointError (files missing,
    damaged or changed since they were recorded), ConfigurationError (the configuration does not build a model) or
    CoverageError (weights and model do not meet).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder. Give the directory that a conversion or a merge wrote.")
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"{directory} is an adapter: merge it first (port-merge-lora BASE {directory} OUT).")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json.")
    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ConfigurationError(f"{directory / 'config.json'} names no model_type.")
    checkpoint = open_checkpoint(directory)
    if not checkpoint.format.startswith("safetensors"):
        raise CheckpointError(
            f"{directory} holds {checkpoint.format} weights; publish safetensors, which run no code."
        )
    family = family_of(config["model_type"])
    _require_model(Base(directory, checkpoint, config), family)
    published = belonging(directory, checkpoint.files, include)
    records = {name: shortened_values(read_json(directory / name)) for name in RECORDS if (directory / name).is_file()}
    if (conversion := read_record(directory)) is not None:
        records["conversion.json"] = shortened_values(conversion)
    _require_tokenizer(directory, config)
    _require_fitting(directory, config, checkpoint, family)
    weights = [file for file in checkpoint.files if file.suffix == ".safetensors"]
    stamps = {file: stamp(file) for file in weights}
    with BackgroundDigests(weights) as digests:
        hashes = {digest.name: digest.sha256 for digest in digests.result(checkpoint.states)}
    changed = require_recorded(directory, hashes, published)
    warnings = [f"{name}: was changed since it was written, or is damaged" for name in changed]
    warnings += [each.line for each in known_faults(config, records.get("training.json"))]
    sizes: dict[torch.dtype, int] = {}
    for ref in checkpoint.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return CheckedDirectory(
        directory,
        config,
        published,
        left_out(directory, published),
        sum(ref.numel for ref in checkpoint.values() if ref.dtype.is_floating_point),
        max(sizes, key=lambda dtype: sizes[dtype]),
        hashes,
        stamps,
        records,
        family,
        tuple(warnings),
    )


def _require_model(found: Base, family: PublishedFamily | None) -> None:
    """The configuration builds a model on the meta device, and the files hold exactly its tensors."""
    expected = _expected(found, family)
    tensors = found.checkpoint.tensors
    wrong = [
        *(f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in tensors),
        *(
            f"{name} is {list(tensors[name].shape)}, the model has {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ),
    ]
    if wrong:
        rest = f"\n      … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise CoverageError(
            f"{found.path}: weights and model do not meet:\n      " + "\n      ".join(wrong[:10]) + rest
        )


def _expected(found: Base, family: PublishedFamily | None) -> Mapping[str, tuple[int, ...]]:
    """Shape by name of every tensor that the model loads; of models whose names transformers changes while it loads,
    none: their files cannot be compared by name."""
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    try:
        config = transformers.AutoConfig.from_pretrained(found.path, trust_remote_code=False, local_files_only=True)
        if family is not None:
            return family.conversion.targets(config).shapes
        name = (config.architectures or [None])[0]
        model_class = getattr(transformers, str(name), None)
        if model_class is None:
            raise ConfigurationError(f"{found.path}: transformers has no architecture {name!r}.")
        shapes = loadable_tensors(model_class, config).shapes
        return {} if get_checkpoint_conversion_mapping(config.model_type) else shapes
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigurationError(f"{found.path}: its config.json builds no model: {error}") from error


def _require_tokenizer(directory: Path, config: Mapping[str, Any]) -> None:
    texts = ("vocab_size", "text_config")
    if any(name in config for name in texts) and not any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
    ):
        raise CheckpointError(
            f"{directory} has no tokenizer, so nobody could use the model. Convert it with --vocab, or put the "
            "tokenizer's files beside config.json."
        )


def _require_fitting(
    directory: Path, config: Mapping[str, Any], checkpoint: Checkpoint, family: PublishedFamily | None
) -> None:
    """The model takes every tensor, and what the tokenizer and the processor make."""
    loaded, findings = load_on_meta(directory, config, checkpoint)
    if loaded is not None and not findings:
        findings = check_companions(directory, loaded, family)[1]
    wrong = [each.line for each in findings if each.severity is Severity.WRONG]
    if wrong:
        raise CoverageError(f"{directory}: its parts do not belong together:\n      " + "\n      ".join(wrong))
