"""OFA and OFA-CN: fairseq's arguments, seams and generation settings beside the native model's.

Source of the left side: OFA-Sys/OFA commit a36b91ce (models/ofa, models/sequence_generator,
criterions/label_smoothed_cross_entropy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, cast

import torch
from transformers import AutoModelForImageTextToText, LogitsProcessor, PreTrainedConfig

from weightport.errors import ReferenceFileError
from weightport.modeling.ofa.generation_ofa import ConstraintRangeLogitsProcessor
from weightport.parity.family import Argument, Family, Generation, Seam, Tensors, stack_and_layer
from weightport.parity.generation import AfterSoftmax, Forced
from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

START, PAD = 0, 1
IGNORED = -100
TOWER = "encoder.embed_images."


def normalised(image: torch.Tensor) -> torch.Tensor:
    """uint8 [batch, 3, H, W] → float32 in [-1, 1]: the original's mean and standard deviation of 0.5, in its order."""
    return (image.float() / 255 - 0.5) / 0.5


ARGUMENTS = (
    Argument("src_tokens", "input_ids"),
    Argument("prev_output_tokens", "decoder_input_ids"),
    Argument("target", "labels"),
    Argument("patch_images", "pixel_values", "images"),
    Argument("image_u8", "pixel_values", "images", normalised),
    Argument("patch_masks", "patch_masks", "samples", torch.Tensor.bool),
    Argument("code_masks", "code_masks", "samples", torch.Tensor.bool),
    Argument("conf", "confidence", "samples"),
    Argument("prefix_tokens", "prefix", "tokens"),
)

EMBEDDING_PARTS = ("embed_tokens", "layernorm_embedding", "type_embedding", "patch_layernorm_embedding")
POSITION_PARTS = ("embed_positions", "pos_ln", "embed_image_positions", "image_pos_ln")


def feed_forward(stack: str) -> tuple[Seam, ...]:
    """The seams inside a layer's feed-forward part, in order, whether norms come before or after."""
    names = {"fc1": "fc1", "ffn_layernorm": "ffn_layer_norm", "fc2": "fc2"}
    return tuple(Seam(f"{stack}.layers.*.{name}", f"model.{stack}.layers.*.{own}") for name, own in names.items())


SEAMS = (
    Seam("vision", "model.encoder.vision_tower", attrgetter("last_hidden_state")),
    Seam("projector", "model.encoder.image_proj"),
    Seam(
        "encoder.mask", "model.encoder", lambda output: ~output.attention_mask.bool(), parts=("model.encoder (masks)",)
    ),
    Seam(
        "encoder.positions",
        "model.encoder",
        attrgetter("position_embeddings"),
        parts=tuple(f"model.encoder.{name}" for name in POSITION_PARTS),
    ),
    Seam(
        "encoder.embeddings",
        "model.encoder.layers.0",
        side="input",
        parts=tuple(f"model.encoder.{name}" for name in EMBEDDING_PARTS),
    ),
    Seam("encoder.layers.*.self_attn", "model.encoder.layers.*.self_attn", itemgetter(0)),
    Seam("encoder.layers.*.attn_ln", "model.encoder.layers.*.self_attn_output_norm"),
    *feed_forward("encoder"),
    Seam("encoder.layers.*", "model.encoder.layers.*"),
    Seam("encoder", "model.encoder", attrgetter("last_hidden_state")),
    Seam("decoder.embeddings", "model.decoder.layers.0", side="input"),
    Seam("decoder.layers.*.self_attn", "model.decoder.layers.*.self_attn", itemgetter(0)),
    Seam("decoder.layers.*.self_attn_ln", "model.decoder.layers.*.self_attn_output_norm"),
    Seam("decoder.layers.*.encoder_attn", "model.decoder.layers.*.cross_attn", itemgetter(0)),
    Seam("decoder.layers.*.cross_attn_ln", "model.decoder.layers.*.cross_attn_output_norm"),
    *feed_forward("decoder"),
    Seam("decoder.layers.*", "model.decoder.layers.*"),
    Seam("decoder", "model.decoder", attrgetter("last_hidden_state")),
    Seam("logits", "lm_head"),
    Seam("loss", "", attrgetter("loss")),
)

GENERATION_OPTIONS = (
    "beam",
    "max_len_a",
    "max_len_b",
    "min_len",
    "lenpen",
    "no_repeat_ngram_size",
    "constraint_range",
    "zero_shot",
)
"""The original's names. `constraint_range` [start, end] allows these ids beside the four special ones, before the
softmax (what is allowed sums to 1) or, with `zero_shot`, after it."""

TRAINING_OPTIONS = ("mode", "label_smoothing", "drop_worst_ratio")
"""`mode` "eval" or "train": whether batch norms use the batch's statistics (dropout is off in both). The others are
the criterion's own."""

PLAIN = dict.fromkeys(
    (
        "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop",
        "encoder_drop_path_rate", "decoder_drop_path_rate", "resnet_drop_path_rate",
    ),
    0.0,
)  # fmt: skip


def complete(kind: Kind, tensors: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Masks as the original derives them (an id of 1 is padding), and the loss's settings."""
    arguments: dict[str, Any] = dict(tensors)
    arguments["attention_mask"] = (tensors["input_ids"] != PAD).long()
    if "decoder_input_ids" in tensors:
        arguments["decoder_attention_mask"] = (tensors["decoder_input_ids"] != PAD).long()
    if kind == "train":
        arguments["labels"] = tensors["labels"].masked_fill(tensors["labels"] == PAD, IGNORED)
        arguments["label_smoothing"] = float(options.get("label_smoothing", 0.0))
        arguments["drop_worst_ratio"] = float(options.get("drop_worst_ratio", 0.0))
    return arguments


def generation(arguments: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> Generation:
    """fairseq's generator settings in transformers' terms. Takes the forced prefix out of `arguments`.

    A hypothesis of the original has at most max_len tokens before its end; transformers counts the start and the end
    too.
    """
    processors: list[LogitsProcessor] = []
    prefix = arguments.pop("prefix", None)
    if prefix is not None:
        processors.append(Forced(prefix, PAD))
    beams = int(options.get("beam", 5))
    longest = int(options.get("max_len_a", 0) * arguments["input_ids"].shape[1] + options.get("max_len_b", 200))
    # As the original: no target is longer than its positions.
    longest = min(longest, config.decoder_max_position_embeddings - 1)
    settings: dict[str, Any] = {
        "max_length": longest + 2,
        "min_new_tokens": int(options.get("min_len", 1)),
        "no_repeat_ngram_size": int(options.get("no_repeat_ngram_size", 0)),
        "early_stopping": beams > 1,
    }
    log_probabilities: Callable[[torch.Tensor], torch.Tensor] = partial(torch.log_softmax, dim=-1)
    if options.get("constraint_range") is not None:
        constraint = _range(options["constraint_range"], config.vocab_size)
        restrict = ConstraintRangeLogitsProcessor(*constraint)
        if options.get("zero_shot"):
            processors.append(AfterSoftmax(restrict))
        else:
            settings["ofa_constraint_range"] = constraint
            log_probabilities = partial(restrict, cast("torch.LongTensor", arguments["input_ids"]))
    return Generation(
        settings,
        beams=beams,
        length_penalty=float(options.get("lenpen", 1.0)),
        processors=processors,
        log_probabilities=log_probabilities,
    )


def _range(constraint: Any, vocabulary: int) -> list[int]:
    fits = isinstance(constraint, list) and len(constraint) == 2 and all(isinstance(i, int) for i in constraint)
    if not fits or not 0 <= constraint[0] < constraint[1] <= vocabulary:
        raise ReferenceFileError(
            f"constraint_range is {constraint!r}; expected [start, end] within the {vocabulary} ids of the vocabulary."
        )
    return constraint


def negative_log_likelihood(output: Any, arguments: Mapping[str, Any], config: PreTrainedConfig) -> torch.Tensor:
    """Mean negative log-likelihood of the targets that the loss is the mean of, computed from the logits.

    drop_worst_ratio chooses them by the smoothed loss, as the original does.
    """
    log_probs = output.logits.log_softmax(-1)
    if "confidence" in arguments:
        log_probs = log_probs * arguments["confidence"].to(log_probs)[:, None, None]
    targets = arguments["labels"] != IGNORED
    log_probs, labels = log_probs[targets], arguments["labels"][targets]
    nll = -log_probs.gather(-1, labels[:, None]).squeeze(-1)
    epsilon = arguments["label_smoothing"]
    spread = epsilon / (log_probs.shape[-1] - 1)
    smoothed = (1 - epsilon - spread) * nll - spread * log_probs.sum(-1)
    kept = smoothed.topk(int(target_count(output, arguments, config)), largest=False).indices
    return nll[kept].mean()


def target_count(output: Any, arguments: Mapping[str, Any], config: PreTrainedConfig) -> torch.Tensor:
    """Tokens the loss is the mean of: all targets, or what drop_worst_ratio leaves of them."""
    count = int((arguments["labels"] != IGNORED).sum())
    return torch.tensor(int(count * (1 - arguments["drop_worst_ratio"])))


def depth(config: PreTrainedConfig, seam: str) -> int:
    """Residual blocks before a seam; a gradient has passed all of them twice."""
    vision = config.vision_config
    tower = sum(vision.depths) if hasattr(vision, "depths") else vision.num_hidden_layers
    encoder = tower + config.encoder_layers
    whole = encoder + config.decoder_layers
    head, layer = stack_and_layer(seam)
    if head == "encoder.layers":
        return tower + int(layer) + 1
    if head == "decoder.layers":
        return encoder + int(layer) + 1
    if seam.startswith(("grad", "after")):
        return 2 * whole
    known = {"vision": tower, "projector": tower, "encoder.embeddings": tower, "encoder": encoder,
             "encoder.positions": 0, "decoder.embeddings": 0}  # fmt: skip
    return known.get(seam, whole)


def kinked(config: PreTrainedConfig, seam: str) -> bool:
    """Gradients that have passed the ResNet's rectifiers, and the norm of all, which holds them."""
    passed = (f"grad.{TOWER}", f"grad_norm.{TOWER}")
    return hasattr(config.vision_config, "depths") and (seam == "grad_norm" or seam.startswith(passed))


NOISE = Noise(growth=48.0, limit=1.5e-5)
"""The depth formula's constants. Growth: between the original and independent implementations in float64, 10 to 60 eps
at depths from 10 to 45. Limit, from the original's float32 against its own float64 (of the scale):

                            tiny                  base        large
    encoder                 2.2e-6 to 3.4e-6      3.1e-6
    logits                  1.5e-6 to 2.4e-6      2.9e-6      4.3e-6 (absolute)

and in gradients that have come all the way back to the image projection 8e-6."""

OFA = Family(
    name="ofa",
    model_type="ofa",
    auto_class=AutoModelForImageTextToText,
    arguments=ARGUMENTS,
    seams=SEAMS,
    required={
        "forward": ("src_tokens", "prev_output_tokens"),
        "train": ("src_tokens", "prev_output_tokens", "target"),
        "generate": ("src_tokens",),
    },
    options={"forward": (), "train": TRAINING_OPTIONS, "generate": GENERATION_OPTIONS},
    complete=complete,
    generation=generation,
    depth=depth,
    noise=NOISE,
    kinked=kinked,
    plain=PLAIN,
    losses={"nll": negative_log_likelihood, "sample_size": target_count},
)
