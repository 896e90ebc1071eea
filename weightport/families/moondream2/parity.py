"""moondream2: the original's arguments, seams and losses beside the native model.

Source of the left side: vikhyat/moondream at the commits of the dated revisions (moondream.py, vision_encoder.py,
modeling_phi.py; of 2025 torch/vision.py, torch/text.py, torch/image_crops.py). The original embeds a text by itself
and puts an image's vectors into it; in a reference ids are -1 where these stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from weightport.errors import ReferenceFileError
from weightport.parity.family import Argument, Family, Generation, Seam, Tensors, stack_and_layer
from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

IGNORED, IMAGE = -100, -1


def as_ids(ids: torch.Tensor) -> torch.Tensor:
    return ids.long()


ARGUMENTS = (
    Argument("pixel_values", "pixel_values", "samples"),
    Argument("sizes", "sizes", "samples", as_ids),
    Argument("tiling", "image_grids", "samples", as_ids),
    Argument("input_ids", "input_ids", "samples", as_ids),
    Argument("attention_mask", "attention_mask", "samples", as_ids),
    Argument("labels", "labels", "samples", as_ids),
)
"""`pixel_values` [batch, 3, height, width] as the original's preprocessing gives them in 2024, and [batch, views, 3,
size, size] in 2025, the whole picture first. `sizes` [batch, 2], (height, width) of each picture, where a batch has
several (then padded with zeros at the bottom and on the right). `tiling` [batch, 2], (rows, columns) of tiles (2025).
`input_ids` [batch, length] with -1 at the image's places. `attention_mask`: all ones where it is left out. `labels`
[batch, length], -100 where nothing is predicted."""


def channels_last(patches: torch.Tensor) -> torch.Tensor:
    """[views, width, rows, columns] → [views, patches, width]."""
    return patches.flatten(2).transpose(1, 2)


SEAMS = (
    Seam("vision.patches", "model.vision_tower.embeddings.patch_embedding", channels_last),
    Seam("vision.embeddings", "model.vision_tower.embeddings"),
    Seam("vision.layers.*", "model.vision_tower.encoder.layers.*"),
    Seam("vision", "model.vision_tower", attrgetter("last_hidden_state")),
    Seam("merged", "model.multi_modal_projector", side="input"),
    Seam("projector", "model.multi_modal_projector"),
    Seam("decoder.embeddings", "model.language_model.layers.0", side="input"),
    Seam("decoder.layers.*", "model.language_model.layers.*"),
    Seam("decoder", "model.language_model.final_layernorm"),
    Seam("logits", "lm_head"),
    Seam("loss", "", attrgetter("loss")),
)


def complete(kind: Kind, tensors: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Views of the pictures, ids with placeholders, masks and positions."""
    ids = tensors["input_ids"]
    if ids.ndim != 2 or 0 in ids.shape:
        raise ReferenceFileError(f"input_ids has the shape {list(ids.shape)}; expected [batch, length].")
    _check_ids(ids, config)
    mask = tensors.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ReferenceFileError(f"attention_mask is {list(mask.shape)}, but input_ids {list(ids.shape)}.")
    arguments: dict[str, Any] = {
        "input_ids": ids.masked_fill(ids == IMAGE, config.image_token_id),
        "attention_mask": mask,
        **_pictures(tensors, config),
    }
    if kind != "generate":
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "labels" in tensors and kind != "generate":
        arguments["labels"] = tensors["labels"]
    return arguments


def _check_ids(ids: torch.Tensor, config: PreTrainedConfig) -> None:
    rows = config.get_text_config().vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < IMAGE or high >= rows:
        raise ReferenceFileError(
            f"input_ids holds ids from {low} to {high}; the vocabulary has {rows} entries, and {IMAGE} marks an image."
        )


def _pictures(tensors: Tensors, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    pixels = tensors["pixel_values"]
    axes = 5 if config.feature_merge == "tiles" else 4
    if pixels.ndim != axes or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ReferenceFileError(
            f"pixel_values has the shape {list(pixels.shape)}; this revision's are [batch, "
            f"{'views, ' if axes == 5 else ''}3, height, width]."
        )
    if config.feature_merge == "none":
        return {"pixel_values": pixels}
    if config.feature_merge == "tiles":
        if "image_grids" not in tensors:
            raise ReferenceFileError("The run lacks tiling, the (rows, columns) of tiles.")
        return {"pixel_values": pixels, "image_grids": tensors["image_grids"]}
    sizes = tensors.get("sizes")
    stated = [tuple(pixels.shape[-2:])] * len(pixels) if sizes is None else [tuple(each) for each in sizes.tolist()]
    side = config.vision_config.image_size
    views = [_views(picture[:, :height, :width], side) for picture, (height, width) in zip(pixels, stated)]
    grids = [(height // side, width // side) for height, width in stated]
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(views, batch_first=True),
        "image_grids": torch.tensor([grid if grid != (1, 1) else (0, 0) for grid in grids]),
    }


def _views(picture: torch.Tensor, side: int) -> torch.Tensor:
    """[1 + crops, 3, side, side] of [3, height, width], whose sides are multiples of `side`: the whole, then crops."""
    height, width = picture.shape[-2:]
    if height % side or width % side:
        raise ReferenceFileError(f"A picture is {height} × {width} pixels, which are no multiples of {side}.")
    # In float32 in a run of either type, as the original's preprocessing is.
    whole = interpolate(picture[None], size=(side, side), mode="bilinear", align_corners=False)
    if (height, width) == (side, side):
        return whole
    crops = picture.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.cat([whole, crops])


def generation(arguments: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> Generation:
    """Greedy decoding, or a beam search, behind the prompt."""
    text = config.get_text_config()
    settings: dict[str, Any] = {
        "max_new_tokens": int(options.get("max_new_tokens", 30)),
        "eos_token_id": int(options.get("eos_token_id", text.eos_token_id)),
        # Of sampling, which a run is not.
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
    }
    return Generation(
        settings,
        beams=int(options.get("num_beams", 1)),
        returned=1,
        prompt_length=arguments["input_ids"].shape[1],
    )


def exact_loss(logits: torch.Tensor, labels: torch.Tensor, **unused: Any) -> torch.Tensor:
    """Mean cross-entropy over all labels, each predicted by the position before it, in the logits' own type."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def depth(config: PreTrainedConfig, seam: str) -> int:
    """Residual blocks before a seam, two a layer; a gradient has passed all of them twice."""
    tower = 2 * config.vision_config.num_hidden_layers
    whole = tower + 2 * config.text_config.num_hidden_layers
    head, layer = stack_and_layer(seam)
    if head == "vision.layers":
        return 2 * (int(layer) + 1)
    if head == "decoder.layers":
        return tower + 2 * (int(layer) + 1)
    if seam.startswith("grad"):
        return 2 * whole
    known = {
        "vision.patches": 0, "vision.embeddings": 0, "vision": tower, "merged": tower, "projector": tower,
        "decoder.embeddings": tower,
    }  # fmt: skip
    return known.get(seam, whole)


def rounds_to_float32(config: PreTrainedConfig, seam: str) -> bool:
    """Rotary tables are float32 in every run. In 2024 both sides compute them alike; in 2025 the original takes them
    from a complex exponential, whose last bits differ: logits of float64 runs lie 2e-8 apart."""
    before = ("vision", "merged", "projector", "decoder.embeddings")
    return config.feature_merge == "tiles" and not seam.startswith(before)


NOISE = Noise(growth=48.0, limit=1.5e-5)

MOONDREAM2 = Family(
    name="moondream2",
    model_type="moondream",
    auto_class=AutoModelForImageTextToText,
    arguments=ARGUMENTS,
    seams=SEAMS,
    required={
        "forward": ("pixel_values", "input_ids"),
        "train": ("pixel_values", "input_ids", "labels"),
        "generate": ("pixel_values", "input_ids"),
    },
    options={"forward": (), "train": ("mode",), "generate": ("max_new_tokens", "num_beams", "eos_token_id")},
    complete=complete,
    generation=generation,
    depth=depth,
    noise=NOISE,
    exact_loss=exact_loss,
    rounds_to_float32=rounds_to_float32,
)
