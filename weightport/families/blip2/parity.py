"""BLIP-2: LAVIS's arguments, seams, losses and generation beside transformers' models.

Source of the left side: salesforce/LAVIS at 506965b9 (models/blip2_models). The original puts the queries' vectors
before the text by itself; the native model takes their places as <image> tokens. It is held against the original with
the original's epsilon in the norm behind the vision encoder, for which transformers' configuration has no field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, Blip2ForImageTextRetrieval, PreTrainedConfig, PreTrainedModel

import weightport.modeling  # noqa: F401 - registers with the Auto classes
from weightport.errors import ReferenceFileError
from weightport.families.blip2.companions import architecture
from weightport.families.blip2.configuration import LN_VISION_EPS
from weightport.families.blip2.conversion import kind_of
from weightport.families.blip2.stage_one import Blip2LavisStageOne, Blip2StageOne
from weightport.modeling.blip2_lavis.modeling_blip2_lavis import Blip2LavisForImageTextRetrieval
from weightport.parity.family import Argument, Correction, Family, Generation, Seam, Tensors, stack_and_layer
from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

IGNORED = -100
HEADS = ("itm", "itc")
"""What a forward run of a stage-1 model computes: the matching head's logits of each pair, or the similarities of all
pictures with all texts."""

STAGE_ONE: Mapping[Any, Any] = {
    Blip2ForImageTextRetrieval: Blip2StageOne,
    Blip2LavisForImageTextRetrieval: Blip2LavisStageOne,
}
"""The class that computes the losses of stage 1, by the one of config.json."""


class Blip2Auto:
    """`from_pretrained` of the class that a directory's config.json is of: Auto classes know one of the two. A
    retrieval model computes the losses of stage 1 too, with what stands in the file beside it."""

    @staticmethod
    def from_pretrained(directory: str | Path, **settings: Any) -> Any:
        """As transformers' own, `output_loading_info` included."""
        local = {key: settings[key] for key in ("local_files_only",) if key in settings}
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **local)
        rest = {key: value for key, value in settings.items() if key != "trust_remote_code"}
        wanted = architecture(config)
        found = STAGE_ONE.get(wanted, wanted).from_pretrained(directory, trust_remote_code=False, **rest)
        if wanted in STAGE_ONE:
            model = found[0] if isinstance(found, tuple) else found
            model.load_side_file(Path(directory))
        return found


def as_ids(ids: torch.Tensor) -> torch.Tensor:
    return ids.long()


ARGUMENTS = (
    Argument("image", "pixel_values", "images"),
    Argument("input_ids", "input_ids", "tokens", as_ids),
    Argument("attention_mask", "attention_mask", "samples", as_ids),
    Argument("labels", "labels", "samples", as_ids),
    Argument("decoder_attention_mask", "decoder_attention_mask", "samples", as_ids),
)
"""`image` normalised. `input_ids` and `attention_mask` of the text alone; `labels` as the original gives them to the
language model: OPT's with the queries' positions, T5's of the answer."""


def first(value: Any) -> Any:
    """A layer's hidden states, which some layers return with more."""
    return value[0] if isinstance(value, tuple) else value


SEAMS = (
    Seam("vision.embeddings", "vision_model.embeddings"),
    Seam("vision.layers.*", "vision_model.encoder.layers.*", first),
    Seam("vision", "vision_model.post_layernorm", side="input"),
    Seam("vision.norm", "vision_model", itemgetter(0)),
    Seam("qformer.layers.*", "qformer.encoder.layer.*", first),
    Seam("qformer", "qformer", itemgetter(0)),
    Seam("projector", "language_projection"),
    Seam("encoder.layers.*", "language_model.encoder.block.*", first),
    Seam("encoder", "language_model.encoder", itemgetter(0)),
    Seam("decoder.layers.*", "language_model.model.decoder.layers.*", first, also="language_model.decoder.block.*"),
    Seam("logits", "", attrgetter("logits")),
    Seam("image_embeds", "", attrgetter("image_embeds")),
    Seam("text_embeds", "", attrgetter("text_embeds")),
    Seam("itc", "", lambda output: output.logits_per_image),
    Seam("itc_pairs", "", lambda output: output.logits_per_image.diagonal()[:, None]),
    Seam("itm", "", lambda output: output.logits_per_image),
    Seam("loss_itc", "", attrgetter("loss_itc")),
    Seam("loss_itm", "", attrgetter("loss_itm")),
    Seam("loss_lm", "", attrgetter("loss_lm")),
    Seam("loss", "", attrgetter("loss")),
)


def complete(kind: Kind, tensors: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Places of the image before the text, and the mask of all."""
    image: Any = config.image_token_id
    queries: Any = config.num_query_tokens
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    arguments: dict[str, Any] = {
        "pixel_values": tensors["pixel_values"],
        "input_ids": pad(tensors["input_ids"], (queries, 0), value=image),
        "attention_mask": pad(mask, (queries, 0), value=1),
    }
    model = kind_of(config)
    if model == "itm" and kind == "train":
        return arguments | {"return_loss": True}
    if model == "itm":
        head = options.get("head", HEADS[0])
        if head not in HEADS:
            raise ReferenceFileError(f"head is {head!r}; expected one of {', '.join(HEADS)}.")
        return arguments | {"use_image_text_matching_head": head == "itm"}
    if kind == "generate":
        return arguments
    labels = tensors.get("labels")
    if labels is None and (model == "t5" or kind == "train"):
        raise ReferenceFileError("The run lacks the input labels, which make its loss, and a T5's decoder inputs.")
    if labels is None:
        return arguments
    arguments["labels"] = labels
    if model == "t5":
        arguments["decoder_attention_mask"] = tensors.get("decoder_attention_mask", (labels != IGNORED).long())
    return arguments


def generation(arguments: Tensors, options: Mapping[str, Any], config: PreTrainedConfig) -> Generation:
    """LAVIS's generate. It counts what it takes for a start in `min_length`, and ends OPT's answers at a line end."""
    text = config.get_text_config()
    settings = {
        "max_new_tokens": int(options.get("max_new_tokens", 30)),
        "min_new_tokens": max(int(options.get("min_length", 1)) - 1, 0),
        "eos_token_id": int(options.get("eos_token_id", text.eos_token_id)),
        "repetition_penalty": float(options.get("repetition_penalty", 1.0)),
    }
    return Generation(
        settings,
        beams=int(options.get("num_beams", 1)),
        length_penalty=float(options.get("length_penalty", 1.0)),
        returned=int(options.get("num_return_sequences", 1)),
        prompt_length=arguments["input_ids"].shape[1] if kind_of(config) == "opt" else 1,
    )


def exact_loss(logits: torch.Tensor, labels: torch.Tensor, **unused: Any) -> torch.Tensor:
    """Mean cross-entropy over all labels, each predicted by the position before it, in the logits' own type."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def depth(config: PreTrainedConfig, seam: str) -> int:
    """Residual blocks before a seam; a gradient has passed all of them twice."""
    vision, qformer, text = config.vision_config, config.qformer_config, config.get_text_config()
    tower = 2 * vision.num_hidden_layers
    queries = tower + 3 * qformer.num_hidden_layers
    encoder = queries + 2 * text.num_hidden_layers
    whole = encoder + 3 * getattr(text, "num_decoder_layers", 0)
    head, layer = stack_and_layer(seam)
    if seam.startswith("grad"):
        return 2 * whole
    before = {
        "vision.layers": (0, 2),
        "qformer.layers": (tower, 3),
        "encoder.layers": (queries, 2),
        "decoder.layers": (encoder, 3) if config.is_encoder_decoder else (queries, 2),
    }
    if head in before:
        start, each = before[head]
        return start + each * (int(layer) + 1)
    known = {"vision.embeddings": 0, "vision": tower, "vision.norm": tower, "qformer": queries, "projector": queries}
    return known.get(seam, encoder if seam == "encoder" else whole)


def use_original_epsilon(model: PreTrainedModel) -> Callable[[], None] | None:
    """Give the norm behind the vision encoder the original's epsilon."""
    norm: Any = model.get_submodule("vision_model.post_layernorm")
    own = norm.eps
    if own == LN_VISION_EPS:
        return None
    norm.eps = LN_VISION_EPS

    def undo() -> None:
        norm.eps = own

    return undo


NOISE = Noise(growth=48.0, limit=1.5e-5)
GRADIENTS = Noise(growth=160.0, limit=1e-4)
"""T5 does not scale its scores of attention: LAVIS's own float32 gradients of the queries lie 2.5e-5 of their scale
from its float64 ones with two layers on each side, and 9.1e-5 with three in the decoder."""

BLIP2 = Family(
    name="blip2",
    model_type="blip-2",
    auto_class=Blip2Auto,
    arguments=ARGUMENTS,
    seams=SEAMS,
    required={"forward": ("image", "input_ids"), "train": ("image", "input_ids"),
              "generate": ("image", "input_ids")},
    options={
        "forward": ("head", "mode"),
        "train": ("mode",),
        "generate": (
            "num_beams", "max_new_tokens", "min_length", "eos_token_id", "repetition_penalty", "length_penalty",
            "num_return_sequences",
        ),
    },
    complete=complete,
    generation=generation,
    depth=depth,
    noise=NOISE,
    noise_of={"grad": GRADIENTS},
    exact_loss=exact_loss,
    casts_to_float32=True,
    correction=Correction(
        f"LAVIS's norm behind the vision encoder has the epsilon {LN_VISION_EPS:g}, and transformers has one for all",
        use_original_epsilon,
    ),
)  # fmt: skip
