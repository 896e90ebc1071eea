"""Tellit: the original's arguments and seams beside transformers' GIT."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from transformers import AutoModelForImageTextToText, PreTrainedConfig

from weightport.parity.family import Argument, Family, Generation, Seam, Tensors
from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

PAD, IGNORED = 0, -100


def complete(kind: Kind, tensors: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """The mask, and the labels: the ids themselves, of which the model shifts its logits by one."""
    arguments: dict[str, Any] = dict(tensors)
    ids = tensors["input_ids"]
    arguments["attention_mask"] = (ids != PAD).long()
    if kind == "train":
        arguments["labels"] = ids.masked_fill(ids == PAD, IGNORED)
    return arguments


def generation(arguments: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> Generation:
    """Greedy decoding behind the prompt."""
    length = arguments["input_ids"].shape[1]
    return Generation({"max_new_tokens": int(options.get("new_tokens", 8))}, prompt_length=length, returned=1)


def depth(config: PreTrainedConfig, seam: str) -> int:
    """Residual blocks before a seam; a gradient has passed all of them twice."""
    vision = config.vision_config.num_hidden_layers
    whole = vision + config.num_hidden_layers
    if seam.startswith("grad"):
        return 2 * whole
    return {"vision": vision, "projector": vision}.get(seam, whole)


TELLIT = Family(
    name="tellit",
    model_type="git",
    auto_class=AutoModelForImageTextToText,
    arguments=(Argument("pixels", "pixel_values", "images"), Argument("ids", "input_ids")),
    seams=(
        Seam("vision", "git.image_encoder", attrgetter("last_hidden_state")),
        Seam("projector", "git.visual_projection"),
        Seam("decoder", "git.encoder", attrgetter("last_hidden_state")),
        Seam("logits", "output"),
        Seam("loss", "", attrgetter("loss")),
    ),
    required={"forward": ("pixels", "ids"), "train": ("pixels", "ids"), "generate": ("pixels", "ids")},
    options={"forward": (), "train": (), "generate": ("new_tokens",)},
    complete=complete,
    generation=generation,
    depth=depth,
    noise=Noise(growth=48.0, limit=1.5e-5),
    casts_to_float32=True,
)
