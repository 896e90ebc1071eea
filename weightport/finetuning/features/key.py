"""The key of kept features: a digest of everything that they depend on."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from weightport.finetuning.data.hashing import fingerprint_of
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.features.cached_part import CachedPart
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.model_loading import Loaded
from weightport.finetuning.setup.precision import autocast_dtype
from weightport.hashing import BackgroundDigests
from weightport.version import __version__

OF_A_MODEL = (".safetensors", ".json", ".txt", ".model", ".jinja")
RECORDS = ("conversion.json", "merge.json", "parity.json", "training.json", "metrics.json", "generation_config.json")
"""Files of a model directory that no forward pass depends on."""

LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "numpy")


def feature_key(
    loaded: Loaded,
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: Samples,
    part: CachedPart,
    records: np.ndarray,
) -> str:
    """64 hexadecimal digits that change with the model's files, its configuration and attention, the processor, the
    prompt, the data (its annotations, its images' files by size and time), the precision, the device and the
    libraries."""
    settings, config = recipe.model, loaded.model.config
    return fingerprint_of(
        [
            [[digest.name, digest.sha256] for digest in _digests(loaded.directory)],
            [part.name, settings.method, settings.dtype, str(autocast_dtype(arguments))],
            [_plain(dict(settings.config)), _attention(config), arguments.tf32],
            _plain(loaded.processor.image_processor.to_dict()),
            [recipe.batch.task, recipe.batch.prompt, recipe.batch.max_prompt_length] if part.per_prompt else [],
            [samples.fingerprint, hashlib.sha256(records.tobytes()).hexdigest()],
            _device(arguments.device),
            [__version__, *(version(library) for library in LIBRARIES)],
        ]
    )


def _digests(directory: Path) -> Any:
    files = sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.suffix in OF_A_MODEL and path.name not in RECORDS
    )
    with BackgroundDigests(files) as digests:
        return digests.result()


def _attention(config: Any) -> list[str]:
    """The attention that each part of the model computes with."""
    inner = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    return [str(getattr(each, "_attn_implementation", None)) for each in (config, *inner)]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(value: Any) -> Any:
    """Plain values of settings and of an image processor's."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
