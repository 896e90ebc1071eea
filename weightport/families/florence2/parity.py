"""Florence-2: the remote code's arguments, seams and generation settings beside transformers' model.

Source of the left side: microsoft/Florence-2-large at f0acedb (modeling_florence2.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from weightport.errors import ReferenceFileError
from weightport.families.florence2.images import image_vectors
from weightport.parity.family import Argument, Family, Generation, Seam, Tensors, stack_and_layer
from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

PAD = 1
IGNORED = -100


def as_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """[batch, channels, height, width] → [batch, height · width, channels], as the original's stages hand them on."""
    return feature_map.flatten(2).transpose(1, 2)


ARGUMENTS = (
    Argument("input_ids", "input_ids", "tokens"),
    Argument("attention_mask", "attention_mask", "samples"),
    Argument("decoder_input_ids", "decoder_input_ids", "tokens"),
    Argument("labels", "labels", "tokens"),
    Argument("pixel_values", "pixel_values", "images"),
)
"""`input_ids` is the prompt alone: the original puts the image's vectors before it by itself. It attends to padding;
a run with an `attention_mask` is one whose outputs are those of its rows without padding, as a model that honours the
mask computes them."""


def first(output: Any) -> torch.Tensor:
    """What an attention returns beside its weights; anything else as it is."""
    return output[0] if isinstance(output, tuple) else output


def inside_layers(stack: str, modules: tuple[str, ...]) -> tuple[Seam, ...]:
    """Seams inside a text layer, which both implementations call the same."""
    return tuple(
        Seam(f"{stack}.layers.*.{name}", f"model.language_model.{stack}.layers.*.{name}", first) for name in modules
    )


SEAMS = (
    Seam("vision.stages.*.embedding", "model.vision_tower.convs.*", as_tokens),
    Seam("vision.stages.*", "model.vision_tower.blocks.*.-1", as_tokens),
    Seam("vision", "model.vision_tower", lambda output: as_tokens(output.last_hidden_state)),
    Seam("projector", "model.multi_modal_projector"),
    Seam("encoder.embeddings", "model.language_model.encoder.layers.0", side="input"),
    *inside_layers("encoder", ("self_attn", "fc1", "fc2")),
    Seam("encoder.layers.*", "model.language_model.encoder.layers.*"),
    Seam("encoder", "model.language_model.encoder", attrgetter("last_hidden_state")),
    Seam("decoder.embeddings", "model.language_model.decoder.layers.0", side="input"),
    *inside_layers("decoder", ("self_attn", "encoder_attn", "fc1", "fc2")),
    Seam("decoder.layers.*", "model.language_model.decoder.layers.*"),
    Seam("logits", "lm_head"),
    Seam("loss", "", attrgetter("loss")),
)

GENERATION_OPTIONS = ("num_beams", "max_new_tokens", "max_length", "length_penalty", "no_repeat_ngram_size",
                      "early_stopping", "min_length", "repetition_penalty", "forced_bos_token_id",
                      "forced_eos_token_id")  # fmt: skip
"""transformers' own names, as the original's `generate` takes them. What a run leaves out comes from the converted
directory's generation_config.json, which has to say what the original's text_config said."""

PLAIN = {
    "text_config": dict.fromkeys(
        ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0
    ),
    "vision_config": {"drop_path_rate": 0.0},
}


def complete(kind: Kind, tensors: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Image placeholders before the prompt, and the mask: all ones unless the run has one of its own."""
    arguments: dict[str, Any] = dict(tensors)
    prompt = tensors["input_ids"]
    mask = tensors.get("attention_mask", torch.ones_like(prompt))
    if "pixel_values" in tensors:
        height, width = tensors["pixel_values"].shape[-2:]
        shape = (prompt.shape[0], image_vectors(config.vision_config, height, width))
        if bool((prompt == config.image_token_id).any()):
            raise ReferenceFileError(f"The prompt holds the id {config.image_token_id}, which stands for images here.")
        arguments["input_ids"] = torch.cat([torch.full(shape, config.image_token_id), prompt], dim=1)
        mask = torch.cat([mask.new_ones(shape), mask], dim=1)
    arguments["attention_mask"] = mask
    if kind == "train" and options.get("ignore_padding"):
        arguments["labels"] = tensors["labels"].masked_fill(tensors["labels"] == PAD, IGNORED)
    return arguments


def generation(arguments: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> Generation:
    """The call of `generate`; the original returns the best hypothesis of each sample."""
    settings = {name: value for name, value in options.items() if name not in ("num_beams", "length_penalty")}
    if (limit := settings.pop("max_length", None)) is not None:
        # The directory states its own max_new_tokens, which would win over a max_length; that counts the start token.
        settings.setdefault("max_new_tokens", limit - 1)
    return Generation(
        settings,
        beams=options.get("num_beams"),
        length_penalty=options.get("length_penalty"),
        returned=1,
    )


def exact_loss(logits: torch.Tensor, labels: torch.Tensor, **unused: Any) -> torch.Tensor:
    """Mean cross-entropy over all labels that are not ignored, in the logits' own type, as the original computes
    it."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def depth(config: PreTrainedConfig, seam: str) -> int:
    """Residual blocks before a seam; a gradient has passed all of them twice. A block of the tower has eight: two
    convolutions, an attention and a feed-forward, in space and then in channels. A layer of the encoder has two, one
    of the decoder three."""
    stages = [8 * blocks for blocks in config.vision_config.depths]
    tower, text = sum(stages), config.text_config
    encoder = tower + 2 * text.encoder_layers
    whole = encoder + 3 * text.decoder_layers
    head, layer = stack_and_layer(seam)
    if head == "vision.stages":
        return sum(stages[: int(layer) + (not seam.endswith(".embedding"))])
    if head == "encoder.layers":
        return tower + 2 * (int(layer) + 1)
    if head == "decoder.layers":
        return encoder + 3 * (int(layer) + 1)
    if seam.startswith("grad"):
        return 2 * whole
    known = {"vision": tower, "projector": tower, "encoder.embeddings": tower, "encoder": encoder,
             "decoder.embeddings": 0}  # fmt: skip
    return known.get(seam, whole)


NOISE = Noise(growth=106.0, limit=2.5e-5)
STAGE_NOISE = Noise(growth=106.0, limit=1.2e-4)
IMAGE_NOISE = Noise(growth=106.0, limit=4e-5)
"""The depth formula's constants. Growth: between the original and native in float64, at the stages of the base model's
vision tower, up to 72 · √(1 + depth) eps.

Limits, from the original's float32 against its own float64 (of the scale):

                            tiny                  base        large       large, our own
    vision.stages.0, 1                            3.2e-6                  7.6e-6
    vision.stages.2                               2.1e-5      5.0e-5      5.0e-5
    vision.stages.3                               8.5e-6                  2.5e-5
    projector               2.8e-6 to 4.9e-6      1.1e-5                  1.3e-5
    encoder.layers.0                                                      2.3e-5
    encoder                 3.8e-6 to 8.9e-6      7.5e-6                  6.2e-6
    logits                  1.6e-6 to 3.4e-6      1.8e-6                  2.6e-6

The last column is our float32 against our float64 on weights by a formula (tests/parity/test_full_size.py). Values
grow on the way through the third stage, of nine blocks, a hundredfold in the base model and further in the large one;
the layer norms behind it bring values and errors back, so that the size shows in the stages and in what takes image
features first. A reference that holds both precisions is judged by its own noise instead."""

FLORENCE2 = Family(
    name="florence2",
    model_type="florence2",
    auto_class=AutoModelForImageTextToText,
    arguments=ARGUMENTS,
    seams=SEAMS,
    required={
        "forward": ("input_ids", "decoder_input_ids"),
        "train": ("input_ids", "labels"),
        "generate": ("input_ids",),
    },
    options={"forward": (), "train": ("mode", "ignore_padding"), "generate": GENERATION_OPTIONS},
    complete=complete,
    generation=generation,
    depth=depth,
    noise=NOISE,
    noise_of={
        "vision.stages.": STAGE_NOISE,
        "projector": IMAGE_NOISE,
        "encoder.embeddings": IMAGE_NOISE,
        "encoder.layers.": IMAGE_NOISE,
    },
    plain=PLAIN,
    exact_loss=exact_loss,
)
