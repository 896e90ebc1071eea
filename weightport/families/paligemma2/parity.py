"""PaliGemma: big_vision's arguments, seams and losses beside transformers' model.

Source of the left side: google-research/big_vision at 0127fb6 (models/proj/paligemma/paligemma.py,
models/ppp/gemma.py, models/vit.py, trainers/proj/paligemma). Logits and losses are those that the original trains and
evaluates with: without final softcap, whatever the converted directory says, and of the rows that the original's
embedding has.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from weightport.errors import ReferenceFileError
from weightport.parity.family import Argument, Family, Generation, Seam, Tensors, stack_and_layer
from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

IGNORED = -100
PREFIX, SUFFIX = 0, 1
"""token_type_ids: what sees all of itself, and what sees only what is before it."""


def channels_first(images: torch.Tensor) -> torch.Tensor:
    """[batch, height, width, 3], or [batch, frames, height, width, 3], → [batch · frames, 3, height, width]."""
    if images.ndim not in (4, 5) or images.shape[-1] != 3 or 0 in images.shape:
        raise ReferenceFileError(
            f"image has the shape {list(images.shape)}; expected [batch, height, width, 3] or [batch, frames, height, "
            "width, 3]."
        )
    return images.flatten(0, -4).permute(0, 3, 1, 2).contiguous()


def as_ids(ids: torch.Tensor) -> torch.Tensor:
    return ids.long()


ARGUMENTS = (
    Argument("image", "pixel_values", "samples", channels_first),
    Argument("text", "input_ids", "tokens", as_ids),
    Argument("mask_ar", "mask_ar", "samples", as_ids),
    Argument("mask_loss", "mask_loss", "samples", as_ids),
    Argument("mask_input", "mask_input", "samples", as_ids),
)
"""`image` in -1..1. `text`: start, prefix, line end, suffix, end, padding; the original puts the image's vectors
before it by itself. `mask_ar`: 0 where positions see each other, 1 where they see what is before them. In training and
evaluation the original masks no padding, which stands behind everything else; for generation `mask_input` does."""


def own_rows(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """The logits of the original's rows: all but those that a padded embedding has more."""
    return logits[..., : config.image_token_index]


SEAMS = (
    Seam("vision.embeddings", "model.vision_tower.embeddings"),
    Seam("vision.layers.*", "model.vision_tower.encoder.layers.*"),
    Seam("vision", "model.vision_tower", attrgetter("last_hidden_state")),
    Seam("projector", "model.multi_modal_projector"),
    Seam("decoder.embeddings", "model.language_model.layers.0", side="input"),
    Seam("decoder.layers.*", "model.language_model.layers.*"),
    Seam("decoder", "model.language_model.norm"),
    Seam("logits", "lm_head", within=own_rows),
    Seam("loss", "", attrgetter("loss")),
)

PLAIN = {"text_config": {"final_logit_softcapping": None}}

MEANS = ("tokens", "examples")
"""What a training run's loss is the mean of: all tokens of the batch, as transformers has it, or each example's mean,
as the original's trainer has it."""


def complete(kind: Kind, tensors: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Image placeholders before the text, which positions see each other, and labels of the text alone."""
    text, causal = tensors["input_ids"], tensors["mask_ar"]
    _check_masks(text, causal)
    count = _image_tokens(tensors["pixel_values"], config, len(text))
    arguments: dict[str, Any] = {
        "pixel_values": tensors["pixel_values"],
        "input_ids": pad(text, (count, 0), value=config.image_token_index),
        "token_type_ids": pad(causal, (count, 0), value=PREFIX),
    }
    if kind == "generate":
        return arguments | _left_padded(arguments, pad(tensors["mask_input"], (count, 0), value=1), config)
    # The original's logits are those of the text: a released vocabulary makes 0.3 GB of those of an image.
    arguments |= {"attention_mask": torch.ones_like(arguments["input_ids"]), "logits_to_keep": text.shape[1]}
    if kind == "train":
        arguments["labels"] = text.masked_fill(tensors["mask_loss"] == 0, IGNORED)
    return arguments


def _check_masks(text: torch.Tensor, causal: torch.Tensor) -> None:
    if text.shape != causal.shape:
        raise ReferenceFileError(f"text is {list(text.shape)}, but mask_ar {list(causal.shape)}.")
    if bool((causal.diff(dim=1) < 0).any()) or not bool(torch.isin(causal, torch.tensor([PREFIX, SUFFIX])).all()):
        raise ReferenceFileError(
            "mask_ar should be zeros (the prefix) and then ones; transformers' token_type_ids can say nothing else."
        )


def _image_tokens(pixels: torch.Tensor, config: PreTrainedConfig, batch: int) -> int:
    """Image tokens of a sample, which may have several images."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 * (len(pixels) // batch)


def _left_padded(arguments: Tensors, mask: torch.Tensor, config: PreTrainedConfig) -> Tensors:
    """The prompts with their padding before them, where generation needs it, and the mask."""
    padding = config.get_text_config().pad_token_id
    moved = {"input_ids": padding, "token_type_ids": PREFIX}
    made = {name: torch.full_like(mask, value) for name, value in moved.items()}
    made["attention_mask"] = torch.zeros_like(mask)
    for row, real in enumerate(mask.bool()):
        length = int(real.sum())
        for name in moved:
            made[name][row, mask.shape[1] - length :] = arguments[name][row][real]
        made["attention_mask"][row, mask.shape[1] - length :] = 1
    return made


def generation(arguments: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> Generation:
    """Greedy decoding behind the prompt."""
    settings = {
        "max_new_tokens": int(options.get("max_decode_len", 30)),
        "eos_token_id": int(options.get("eos_token", config.get_text_config().eos_token_id)),
    }
    return Generation(settings, prompt_length=arguments["input_ids"].shape[1], returned=1)


def training_loss(
    output: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], config: PreTrainedConfig
) -> torch.Tensor | None:
    """The loss of a run that transformers' own is not: of each example's mean, or over fewer rows than a padded
    embedding has. None where it is transformers' own."""
    mean = options.get("mean", MEANS[0])
    if mean not in MEANS:
        raise ReferenceFileError(f"mean is {mean!r}; expected one of {', '.join(MEANS)}.")
    if mean == MEANS[0] and output.logits.shape[-1] == config.image_token_index:
        return None
    labels = arguments["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        own_rows(output.logits, config)[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    counts = (labels != IGNORED).sum(1)
    return losses.sum() / counts.sum() if mean == MEANS[0] else (losses.sum(1) / counts).mean()


def exact_loss(logits: torch.Tensor, labels: torch.Tensor, **unused: Any) -> torch.Tensor:
    """Mean cross-entropy over all labels, each predicted by the position before it, in the logits' own type."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


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
    known = {"vision.embeddings": 0, "vision": tower, "projector": tower, "decoder.embeddings": tower}
    return known.get(seam, whole)


NOISE = Noise(growth=48.0, limit=1.5e-5)

PALIGEMMA2 = Family(
    name="paligemma2",
    model_type="paligemma",
    auto_class=AutoModelForImageTextToText,
    arguments=ARGUMENTS,
    seams=SEAMS,
    required={
        "forward": ("image", "text", "mask_ar"),
        "train": ("image", "text", "mask_ar", "mask_loss"),
        "generate": ("image", "text", "mask_ar", "mask_input"),
    },
    options={"forward": (), "train": ("mean",), "generate": ("max_decode_len", "eos_token")},
    complete=complete,
    generation=generation,
    depth=depth,
    noise=NOISE,
    plain=PLAIN,
    training_loss=training_loss,
    exact_loss=exact_loss,
    casts_to_float32=True,
)
