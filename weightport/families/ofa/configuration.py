"""OFAConfig from a checkpoint: sizes from the tensors' shapes, the rest from the training run's options.

What the shapes say is never asked of the options; where a checkpoint states both and they contradict each other it is
refused, because then one of the two belongs to another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from weightport.checkpoints import TensorRef
from weightport.converters.layer_count import count_layers
from weightport.errors import ConfigurationError

Tensors = Mapping[str, TensorRef]

# Depths of the first three stages (the original cuts the fourth). All are Bottleneck networks: resnet34 is resnet50.
RESNET_DEPTHS = {
    "resnet18": (2, 2, 2),
    "resnet34": (3, 4, 6),
    "resnet50": (3, 4, 6),
    "resnet101": (3, 4, 23),
    "resnet152": (3, 8, 36),
}
RESNET_EMBEDDING, RESNET_WIDTHS = 64, (256, 512, 1024)

# Entries of decoder.image_position_idx beside the code window: a start position and 769 text positions (768 in the
# existing ports).
INDEX_OVERHEADS = (770, 769)

# (d_model, encoder layers, decoder layers) → the name OFA's authors gave the size.
SIZE_NAMES = {
    (256, 4, 4): "tiny",
    (512, 4, 4): "medium",
    (768, 6, 6): "base",
    (1024, 12, 12): "large",
    (1280, 24, 12): "huge",
}


@dataclass(frozen=True)
class ShapeFact:
    """A configuration field that the tensors determine, and the option of the training run that must agree with it."""

    field: str
    option: str
    read: Callable[[Tensors], Any]


def _has(name: str) -> Callable[[Tensors], bool]:
    pattern = re.compile(name)
    return lambda tensors: any(pattern.fullmatch(key) for key in tensors)


def _axis(name: str, axis: int) -> Callable[[Tensors], int]:
    def read(tensors: Tensors) -> int:
        ref = tensors.get(name)
        if ref is None or len(ref.shape) <= axis:
            found = "is not in the checkpoint" if ref is None else f"has the shape {list(ref.shape)}"
            raise ConfigurationError(f"{name} {found}; the model's sizes cannot be told without it.")
        return ref.shape[axis]

    return read


def _count(pattern: str) -> Callable[[Tensors], int]:
    return partial(count_layers, re.compile(pattern))


def _less(read: Callable[[Tensors], int], amount: int) -> Callable[[Tensors], int]:
    return lambda tensors: read(tensors) - amount


def _token_buckets(tensors: Tensors) -> int:
    rows = _axis("encoder.token_rel_pos_table_list.0.weight", 0)(tensors)
    return (rows + 1) // 2


def _image_buckets(tensors: Tensors) -> int:
    rows = _axis("encoder.embed_image_positions.weight", 0)(tensors)
    side = math.isqrt(rows - 1)
    if side * side != rows - 1:
        raise ConfigurationError(
            f"encoder.embed_image_positions.weight has {rows} rows; expected a square plus one "
            "(image_bucket_size² + 1)."
        )
    return side


SHAPE_FACTS = (
    ShapeFact("vocab_size", "vocab_size", _axis("encoder.embed_tokens.weight", 0)),
    ShapeFact("d_model", "encoder_embed_dim", _axis("encoder.embed_tokens.weight", 1)),
    ShapeFact("encoder_layers", "encoder_layers", _count(r"encoder\.layers\.(\d+)\.")),
    ShapeFact("decoder_layers", "decoder_layers", _count(r"decoder\.layers\.(\d+)\.")),
    ShapeFact("encoder_ffn_dim", "encoder_ffn_embed_dim", _axis("encoder.layers.0.fc1.weight", 0)),
    ShapeFact("decoder_ffn_dim", "decoder_ffn_embed_dim", _axis("decoder.layers.0.fc1.weight", 0)),
    ShapeFact(
        "encoder_attention_heads", "encoder_attention_heads", _axis("encoder.token_rel_pos_table_list.0.weight", 1)
    ),
    ShapeFact(
        "decoder_attention_heads", "decoder_attention_heads", _axis("decoder.token_rel_pos_table_list.0.weight", 1)
    ),
    ShapeFact("max_position_embeddings", "max_source_positions", _less(_axis("encoder.embed_positions.weight", 0), 2)),
    ShapeFact(
        "decoder_max_position_embeddings", "max_target_positions", _less(_axis("decoder.embed_positions.weight", 0), 2)
    ),
    ShapeFact("token_bucket_size", "token_bucket_size", _token_buckets),
    ShapeFact("image_bucket_size", "image_bucket_size", _image_buckets),
    ShapeFact("scale_attn", "scale_attn", _has(r"encoder\.layers\.0\.attn_ln\.weight")),
    ShapeFact("scale_fc", "scale_fc", _has(r"encoder\.layers\.0\.ffn_layernorm\.weight")),
    ShapeFact("scale_heads", "scale_heads", _has(r"encoder\.layers\.0\.self_attn\.c_attn")),
    ShapeFact("scale_resids", "scale_resids", _has(r"encoder\.layers\.0\.w_resid")),
    ShapeFact("layernorm_embedding", "layernorm_embedding", _has(r"encoder\.layernorm_embedding\.weight")),
    ShapeFact(
        "patch_layernorm_embedding", "patch_layernorm_embedding", _has(r"encoder\.patch_layernorm_embedding\.weight")
    ),
    ShapeFact(
        "code_layernorm_embedding", "code_layernorm_embedding", _has(r"decoder\.code_layernorm_embedding\.weight")
    ),
    ShapeFact("add_type_embedding", "add_type_embedding", _has(r"encoder\.type_embedding\.weight")),
    ShapeFact("encoder_normalize_before", "encoder_normalize_before", _has(r"encoder\.layer_norm\.weight")),
    ShapeFact("decoder_normalize_before", "decoder_normalize_before", _has(r"decoder\.layer_norm\.weight")),
)


@dataclass(frozen=True)
class OptionFact:
    """A configuration field that only the training run's options tell.

    `default` is what OFA's architecture functions use when the option is absent from a checkpoint that has options;
    `released` what every training script of the repository passes, assumed when a file holds no options at all.
    """

    field: str
    option: str
    default: Any
    released: Any
    convert: Callable[[Any], Any] = lambda value: value


def _not(value: Any) -> bool:
    return not value


def _probability(value: Any) -> float:
    return float(value or 0.0)


OPTION_FACTS = (
    OptionFact("attn_scale_factor", "attn_scale_factor", 2.0, 2.0, float),
    OptionFact("scale_embedding", "no_scale_embedding", True, True, _not),
    OptionFact("entangle_position_embedding", "entangle_position_embedding", False, False, bool),
    OptionFact("disable_entangle", "disable_entangle", False, True, bool),
    OptionFact("interpolate_position", "interpolate_position", False, False, bool),
    OptionFact("orig_patch_image_size", "orig_patch_image_size", 256, 256, int),
    OptionFact("activation_function", "activation_fn", "gelu", "gelu", str),
    OptionFact("dropout", "dropout", 0.1, 0.1, _probability),
    OptionFact("attention_dropout", "attention_dropout", 0.0, 0.0, _probability),
    OptionFact("encoder_layerdrop", "encoder_layerdrop", 0.0, 0.0, _probability),
    OptionFact("decoder_layerdrop", "decoder_layerdrop", 0.0, 0.0, _probability),
    OptionFact("encoder_drop_path_rate", "encoder_drop_path_rate", 0.0, 0.1, _probability),
    OptionFact("decoder_drop_path_rate", "decoder_drop_path_rate", 0.0, 0.1, _probability),
    OptionFact("resnet_drop_path_rate", "resnet_drop_path_rate", 0.0, 0.0, _probability),
)

# Options that change the forward pass in ways the native model does not have, and the only value it can hold.
REFUSED_OPTIONS = {
    "no_token_positional_embeddings": (False, "the model always has positions"),
    "no_cross_attention": (False, "the decoder always attends to the encoder"),
    "cross_self_attention": (False, "cross- and self-attention are separate"),
    "adaptive_softmax_cutoff": (None, "the output projection is one matrix"),
    "encoder_prompt": (False, "prefix tuning adds keys and values to every layer"),
    "decoder_prompt": (False, "prefix tuning adds keys and values to every layer"),
    "quant_noise_scalar": (0, "weights are not quantised"),
}


def shape_values(tensors: Tensors) -> dict[str, Any]:
    """Every field of SHAPE_FACTS, read from the tensors. Raises ConfigurationError when one it needs is missing."""
    return {fact.field: fact.read(tensors) for fact in SHAPE_FACTS}


def adapter_width(tensors: Tensors) -> int | None:
    """Width of the bottleneck adapters (adapter tuning), None when there are none."""
    ref = tensors.get(
        "encoder.layers.0.adapter.down_proj.weight", tensors.get("decoder.layers.0.adapter.down_proj.weight")
    )
    return ref.shape[0] if ref is not None else None


def option_values(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every field of OPTION_FACTS from the training run's options; None: a file without options."""
    values = {}
    for fact in OPTION_FACTS:
        value = fact.released if options is None else options.get(fact.option, fact.default)
        values[fact.field] = fact.convert(fact.default if value is None else value)
    values["activation_dropout"] = _activation_dropout(options or {})
    return values


def _activation_dropout(options: Mapping[str, Any]) -> float:
    # fairseq falls back to the older name when the newer one is 0 or absent.
    return _probability(options.get("activation_dropout")) or _probability(options.get("relu_dropout"))


def check_options(values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ConfigurationError naming every option that contradicts the shapes or asks for what cannot be held."""
    wrong = [
        f"{fact.option} is {options[fact.option]!r} in the options, but the tensors show {values[fact.field]!r}"
        for fact in SHAPE_FACTS
        if options.get(fact.option) is not None and options[fact.option] != values[fact.field]
    ]
    if wrong:
        raise ConfigurationError(
            "The checkpoint's options and its tensors belong to different models:\n      " + "\n      ".join(wrong)
        )
    refused = [
        f"{option} = {options[option]!r} ({because})"
        for option, (only, because) in REFUSED_OPTIONS.items()
        if option in options and (options[option] or None) != (only or None)
    ]
    if refused:
        raise ConfigurationError(
            "This checkpoint was trained with options that the native OFA model does not have:\n      "
            + "\n      ".join(refused)
        )


def vision_values(tensors: Tensors, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`vision_config`, and how the batch norms behave. Raises ConfigurationError for a tower it cannot hold."""
    resblocks = _count(r"encoder\.embed_images\.transformer\.resblocks\.(\d+)\.")(tensors)
    if resblocks:
        return {"vision_config": _vit(tensors, resblocks)}
    depths = tuple(_count(rf"encoder\.embed_images\.layer{stage}\.(\d+)\.")(tensors) for stage in (1, 2, 3))
    declared = (options or {}).get("resnet_type")
    if declared is not None and RESNET_DEPTHS.get(str(declared)) != depths:
        expected = RESNET_DEPTHS.get(str(declared))
        raise ConfigurationError(
            f"resnet_type is {declared!r} in the options"
            + (f", which has stages of {expected} blocks" if expected else ", which is unknown")
            + f"; the tensors show {depths}."
        )
    return {
        "vision_config": {
            "model_type": "resnet",
            "num_channels": 3,
            "embedding_size": RESNET_EMBEDDING,
            "hidden_sizes": list(RESNET_WIDTHS),
            "depths": list(depths),
            "layer_type": "bottleneck",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        },
        # Neither shows in names or shapes: OFA's synchronised batch norm has its own epsilon.
        "batch_norm_eps": 1e-3 if (options or {}).get("sync_bn") else 1e-5,
        "freeze_batch_norm": "encoder.embed_images.bn1.num_batches_tracked" not in tensors,
    }


def _vit(tensors: Tensors, layers: int) -> dict[str, Any]:
    width, _, patch, _ = tensors["encoder.embed_images.conv1.weight"].shape
    rows = tensors["encoder.embed_images.positional_embedding"].shape[0]
    return {
        "model_type": "ofa_vit",
        "hidden_size": width,
        "intermediate_size": tensors["encoder.embed_images.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": layers,
        # CLIP's rule, which OFA's ViT follows: 64 dimensions a head.
        "num_attention_heads": max(1, width // 64),
        "patch_size": patch,
        "image_size": math.isqrt(rows - 1) * patch,
        "num_channels": 3,
    }


def code_image_size(tensors: Tensors, options: Mapping[str, Any] | None) -> int:
    """Side of the images whose codes the decoder writes, in pixels, from decoder.image_position_idx or the options."""
    declared = (options or {}).get("code_image_size")
    index = tensors.get("decoder.image_position_idx")
    if index is None:
        return int(declared or 128)
    windows = [math.isqrt(max(index.shape[0] - overhead, 0)) for overhead in INDEX_OVERHEADS]
    window = next((w for w, o in zip(windows, INDEX_OVERHEADS) if w * w + o == index.shape[0]), None)
    if window is None or (declared is not None and int(declared) // 8 != window):
        found = "no square window" if window is None else f"{window * 8}"
        raise ConfigurationError(
            f"decoder.image_position_idx has {index.shape[0]} entries, which is for a code_image_size of {found}; "
            f"the options say {declared}."
        )
    return int(declared) if declared is not None else window * 8


def size_name(values: Mapping[str, Any]) -> str:
    """tiny, medium, base, large, huge, or the sizes themselves."""
    sizes = values["d_model"], values["encoder_layers"], values["decoder_layers"]
    return SIZE_NAMES.get(sizes, "of width {} with {} + {} layers".format(*sizes))
