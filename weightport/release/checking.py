"""What a directory must be before it is published: complete, consistent, and the bytes that its records speak of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.base_model import Base
from weightport.checkpoints import open_checkpoint
from weightport.checkpoints.formats.sharded import read_json
from weightport.converters.native import loadable_tensors
from weightport.converters.record import read_record
from weightport.errors import CheckpointError, ConfigurationError, CoverageError
from weightport.hashing import BackgroundDigests
from weightport.release.family import PublishedFamily

_PUBLISHED = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".md", ".html", ".tiktoken"})
_ALSO = frozenset({"LICENSE", "NOTICE"})
_PRIVATE = frozenset({"training_args.json", "trainer_state.json", "README.md"})


@dataclass(frozen=True)
class CheckedDirectory:
    """A directory that may be published. `dtype` holds most bytes; `records` are its JSON records by file name."""

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    parameters: int
    dtype: torch.dtype
    hashes: Mapping[str, str]
    records: Mapping[str, Any]
    family: PublishedFamily | None

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def needs_code(self) -> bool:
        """Whether transformers has no class of its own for the model."""
        return self.family is not None and bool(self.family.portable)


def check_directory(directory: str | Path, family_of: Callable[[object], PublishedFamily | None]) -> CheckedDirectory:
    """Check the model directory, reading its weights once for their hashes.

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
    files = _published(directory, {path.name for path in checkpoint.files})
    records: dict[str, Any] = {
        name: read_json(directory / name)
        for name in ("merge.json", "parity.json", "metrics.json", "training.json")
        if (directory / name).is_file()
    }
    if (conversion := read_record(directory)) is not None:
        records["conversion.json"] = conversion
    _require_tokenizer(directory, config)
    weights = [file for file in checkpoint.files if file.suffix == ".safetensors"]
    with BackgroundDigests(weights) as digests:
        hashes = {digest.name: digest.sha256 for digest in digests.result(checkpoint.states)}
    _require_recorded(directory, hashes, records)
    sizes: dict[torch.dtype, int] = {}
    for ref in checkpoint.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return CheckedDirectory(
        directory,
        config,
        files,
        sum(ref.numel for ref in checkpoint.values() if ref.dtype.is_floating_point),
        max(sizes, key=lambda dtype: sizes[dtype]),
        hashes,
        records,
        family,
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


def _published(directory: Path, weights: set[str]) -> tuple[Path, ...]:
    """The files that belong on the Hub, in the order of their names. README.md is written anew."""
    return tuple(
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _PRIVATE
        and (path.suffix in _PUBLISHED or path.name in _ALSO)
        and (path.suffix != ".safetensors" or path.name in weights)
    )


def _require_tokenizer(directory: Path, config: Mapping[str, Any]) -> None:
    texts = ("vocab_size", "text_config")
    if any(name in config for name in texts) and not any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
    ):
        raise CheckpointError(
            f"{directory} has no tokenizer, so nobody could use the model. Convert it with --vocab, or put the "
            "tokenizer's files beside config.json."
        )


def _require_recorded(directory: Path, hashes: Mapping[str, str], records: Mapping[str, Any]) -> None:
    """The weights are those that the last record speaks of."""
    name = "merge.json" if "merge.json" in records else "conversion.json"
    recorded = records.get(name, {}).get("files") if isinstance(records.get(name), Mapping) else None
    if "training.json" in records and name == "conversion.json":
        # Training came after the conversion.
        return
    for entry in recorded or ():
        if entry.get("file") in hashes and hashes[entry["file"]] != entry.get("sha256"):
            raise CheckpointError(
                f"{directory / entry['file']} has the SHA-256 {hashes[entry['file']][:12]}…, but {name} was written "
                f"for {str(entry.get('sha256'))[:12]}…: the weights changed since. Remove {name} if that was meant."
            )
