"""The model directory that a run starts from: model, processor, family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from weightport.checkpoints import open_checkpoint
from weightport.devices import settle_arithmetic
from weightport.errors import CheckpointError, RecipeError, TrainingError
from weightport.finetuning.family import Family
from weightport.finetuning.recipes.settings import BatchSettings, ModelSettings
from weightport.panics import panics_as_errors

_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is fetched, and no code of the directory is run."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be trained or asked, with its processor."""

    directory: Path
    model: PreTrainedModel
    processor: Any
    family: Family


def load_processor(directory: Path, family: Family | None, batch: BatchSettings) -> Any:
    """The directory's processor, making images of `batch.image_size`. Without a `family` these stay the processor's
    own."""
    from transformers import AutoConfig, AutoProcessor

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    try:
        with panics_as_errors():
            processor = AutoProcessor.from_pretrained(directory, **_LOCAL)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{directory} has no whole tokenizer and processor: {error}") from error
    if batch.image_size is not None and family is not None:
        family.resize(processor, AutoConfig.from_pretrained(directory, **_LOCAL), batch.image_size)
    return processor


def load_model(
    directory: Path,
    family: Family | None,
    settings: ModelSettings,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    auto_class: str = "AutoModelForImageTextToText",
) -> Any:
    """The directory's model in `dtype`, by default that of training; with `qlora` its linear layers in 4 bits, on
    `device`, as its `family` has them. `auto_class`: of transformers', which loads it."""
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    config = AutoConfig.from_pretrained(directory, **_LOCAL)
    for name, value in settings.config.items():
        _set_config(config, name, value)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype or getattr(torch, settings.dtype),
        "output_loading_info": True,
        **_LOCAL,
    }
    if settings.attention is not None:
        _require_attention(config, settings.attention, auto_class)
        options["attn_implementation"] = settings.attention
    if settings.method == "qlora" and family is not None:
        options |= {"quantization_config": four_bits(family), "device_map": {"": device}}
    logging.disable_progress_bar()
    settle_arithmetic()
    # Our reader says what is wrong with a damaged file, and what to do.
    open_checkpoint(directory)
    try:
        loaded: Any = getattr(transformers, auto_class).from_pretrained(directory, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    model, found = loaded
    absent = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if absent:
        # transformers would begin with random numbers there.
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointError(
            f"{directory} has no weights of the right shape for {', '.join(sorted(absent)[:3])}{more}: it is not "
            "whole, or its config.json belongs to another model."
        )
    return model


def _require_attention(config: Any, name: str, auto_class: str) -> None:
    """Raises RecipeError for an implementation of attention that the model or this machine does not have."""
    import transformers

    try:
        with torch.device("meta"):
            getattr(transformers, auto_class).from_config(config, attn_implementation=name)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"model.attention cannot be {name!r}: {error}") from error


def _set_config(config: Any, name: str, value: Any) -> None:
    *outer, last = name.split(".")
    for each in outer:
        config = getattr(config, each, None)
    fields = config.to_dict() if config is not None else {}
    if last not in fields:
        near = [
            f"model.config.{key}.{last}" for key, inner in fields.items() if isinstance(inner, dict) and last in inner
        ]
        hint = f" (did you mean {' or '.join(near)}?)" if near and not outer else ""
        raise RecipeError(f"model.config.{name}: the model's config.json has no {name!r}{hint}.")
    try:
        setattr(config, last, value)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RecipeError(f"model.config.{name} cannot be {value!r}: {reason}") from error


def four_bits(family: Family) -> Any:
    """QLoRA's quantisation: NF4 with double quantisation, computing in bfloat16. Raises TrainingError without it."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        raise TrainingError(
            f"--method qlora needs bitsandbytes, which cannot be imported ({type(error).__name__}: {error}).\n"
            "  Install it where a GPU is (pip install bitsandbytes), or use --method lora."
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(family.full_precision),
    )
