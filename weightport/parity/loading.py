"""A converted model directory as a running model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from weightport.checkpoints import open_checkpoint
from weightport.devices import settle_arithmetic
from weightport.errors import CheckpointError, ConfigurationError, CoverageError
from weightport.parity.family import Family
from weightport.parity.streaming import stream_weights


def load_native(
    directory: Path,
    family: Family,
    dtype: torch.dtype | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    stream: bool = False,
) -> PreTrainedModel:
    """The model of a converted directory, in evaluation mode; no code of the directory is executed.

    `dtype` None keeps the stored one. `stream`: weights stay as the files have them, and are widened to `dtype` one by
    one while the model runs (see streaming.py). `overrides` replace configuration values. Raises CheckpointError when
    the directory is none, CoverageError when its weights and its configuration do not meet.
    """
    settle_arithmetic()
    directory = Path(directory)
    loaded_in = _narrower(directory, dtype) if stream and dtype is not None else dtype
    own = {"trust_remote_code": False, "local_files_only": True}
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(directory, **own)
            _replace(config, overrides or {})
            model, info = family.auto_class.from_pretrained(
                directory,
                config=config,
                dtype=loaded_in or "auto",
                output_loading_info=True,
                **attention,
                **own,
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The model in {directory} cannot be loaded: {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        asked = "" if attn_implementation is None else f" with {attn_implementation} attention"
        raise ConfigurationError(
            f"The model in {directory} cannot be built from its config.json{asked}: {error}"
        ) from error
    wrong = {
        what: sorted(map(str, info.get(what) or ())) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        found = "; ".join(f"{what.replace('_', ' ')}: {', '.join(keys[:8])}" for what, keys in wrong.items() if keys)
        raise CoverageError(f"The weights in {directory} are not those of its config.json ({found}).")
    model = model.to(device).eval()
    if loaded_in != dtype and dtype is not None:
        stream_weights(model, dtype, casts_to_float32=family.casts_to_float32)
    return model


def _replace(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Set values of a configuration, those of a mapping in the configuration of that name. (As arguments of
    from_pretrained they would make a part's configuration anew, without the attention that was asked for.)"""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _replace(getattr(config, name), value)
        else:
            setattr(config, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of the library's while the block runs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _narrower(directory: Path, dtype: torch.dtype) -> torch.dtype:
    """The type that holds every floating-point tensor of the model in `directory`: `dtype` itself where that is no
    narrower. Files beside the weights (a reference, an adapter) are none of it."""
    stored = {ref.dtype for ref in open_checkpoint(directory).values() if ref.dtype.is_floating_point}
    widest = reduce(torch.promote_types, stored) if stored else dtype
    return widest if widest != dtype and torch.promote_types(widest, dtype) == dtype else dtype
