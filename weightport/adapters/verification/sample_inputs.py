"""Arguments of a forward pass that runs every tower of a model: through its processor where the directory has one,
else made up from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.panics import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]

_TEXT = 12
"""Tokens of a prompt."""


def sample_inputs(model: PreTrainedModel, directory: Path, prompt: str | None = None) -> Inputs:
    """Arguments of a forward pass: an image and a prompt where the model takes both, token ids, or an image alone.

    `prompt`: one that makes every part of the model run; None: any text does.
    """
    found = _processed(directory, prompt or "what is this?") or next(_fitting(model))
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in found:
        found["decoder_input_ids"] = _tokens(model, 7)
    return found


def _processed(directory: Path, prompt: str) -> Inputs:
    if not any((directory / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return {}
    from PIL import Image
    from transformers import AutoProcessor

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    pixels = torch.randint(0, 256, (64, 80, 3), generator=_random(), dtype=torch.uint8)
    try:
        with panics_as_errors():
            processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        batch = processor(text=prompt, images=Image.fromarray(pixels.numpy()), return_tensors="pt")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # A directory with an image processor alone, or one that takes other arguments: what is made up does as well.
        return {}
    # Without an answer PaliGemma's labels are all to be passed over: their loss is no number.
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"}


def _fitting(model: PreTrainedModel) -> Iterator[Inputs]:
    """Made-up arguments that the model takes, those that run most of it first."""
    for make in (_image_and_text, _image_beside_text, _image, _text):
        found = make(model)
        if found and _runs(model, found):
            yield found
    yield _text(model)


@torch.no_grad()
def _runs(model: PreTrainedModel, arguments: Inputs) -> bool:
    if getattr(model.config, "is_encoder_decoder", False):
        arguments = {**arguments, "decoder_input_ids": _tokens(model, 7)}
    try:
        model(**arguments)
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False
    return True


def _image_and_text(model: PreTrainedModel) -> Inputs:
    """An image whose features take the place of image tokens in the prompt."""
    token = next(
        (t for name in ("image_token_id", "image_token_index") if (t := _setting(model, name)) is not None), None
    )
    pixels = _pixels(model)
    if token is None or not pixels or not _takes(model, "pixel_values", "input_ids"):
        return {}
    count = _image_tokens(model, pixels)
    if not count:
        return {}
    ids = torch.cat([torch.full((1, count), int(token)), _tokens(model, _TEXT)], dim=1)
    return {"input_ids": ids, **pixels, **_marks(model, ids, int(token))}


def _marks(model: PreTrainedModel, ids: torch.Tensor, token: int) -> Inputs:
    """Which tokens are an image's, for models that ask for it; all are attended to."""
    found = {"attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if _takes(model, name):
            found[name] = (ids == token).long()
    return found


def _image_beside_text(model: PreTrainedModel) -> Inputs:
    """An image beside the prompt, which has no tokens for it (cross attention, and encoders of their own)."""
    pixels = _pixels(model)
    return (
        {**pixels, "input_ids": _tokens(model, _TEXT)} if pixels and _takes(model, "pixel_values", "input_ids") else {}
    )


def _image(model: PreTrainedModel) -> Inputs:
    return _pixels(model) if _takes(model, "pixel_values") else {}


def _text(model: PreTrainedModel) -> Inputs:
    return {"input_ids": _tokens(model, _TEXT)}


@torch.no_grad()
def _image_tokens(model: PreTrainedModel, pixels: Inputs) -> int:
    """How many tokens an image takes: as many as it has features."""
    features = getattr(model, "get_image_features", None)
    if features is None:
        return 0
    try:
        found = features(**pixels)
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
        return 0
    found = getattr(found, "pooler_output", found)
    parts = [found] if isinstance(found, torch.Tensor) else list(found or ())
    return sum(part.numel() // part.shape[-1] for part in parts if isinstance(part, torch.Tensor))


def _pixels(model: PreTrainedModel) -> Inputs:
    """An image in the shape that the vision tower's configuration asks for; nothing for models without one."""
    config: Any = model.config
    vision = next(
        (c for name in ("vision_config", "encoder") if (c := getattr(config, name, None)) is not None), config
    )
    patch, temporal = getattr(vision, "patch_size", 16), getattr(vision, "temporal_patch_size", None)
    channels = next(
        (
            c
            for name in ("num_channels", "in_channels", "in_chans")
            if isinstance(c := getattr(vision, name, None), int)
        ),
        3,
    )
    if temporal is not None and hasattr(vision, "spatial_merge_size"):
        # Flattened patches and their grid, as Qwen's processors give them.
        side = 2 * int(vision.spatial_merge_size)
        values = torch.randn(side * side, channels * temporal * patch * patch, generator=_random())
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, side, side]])}
    if (
        vision is config
        and getattr(model, "main_input_name", "") != "pixel_values"
        and not _takes(model, "pixel_values")
    ):
        return {}
    size = getattr(vision, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    tiles = getattr(vision, "max_num_tiles", None)
    if tiles is not None:
        values = torch.randn(1, 1, tiles, channels, height, width, generator=_random())
        ratios = {
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
        }
        return {"pixel_values": values, **ratios}
    return {"pixel_values": torch.randn(1, channels, height, width, generator=_random())}


def _setting(model: PreTrainedModel, name: str) -> Any:
    return getattr(model.config, name, None)


def _takes(model: PreTrainedModel, *names: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return all(name in parameters for name in names)


def _tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Token ids [1, length], of the lower half of the vocabulary: special tokens for images stand at its end."""
    rows = int(model.config.get_text_config(decoder=True).vocab_size)
    return torch.randint(min(4, rows - 1), max(rows // 2, 5), (1, length), generator=_random())


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)
