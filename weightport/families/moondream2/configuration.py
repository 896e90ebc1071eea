"""The native configuration of a moondream2: sizes from shapes, the rest from config.json and the revision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import TensorRef
from weightport.errors import ConfigurationError
from weightport.families.moondream2.layouts import PROJECTOR_INPUT
from weightport.families.moondream2.revisions import Keys, Merge, Revision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TANH, EXACT = "gelu_pytorch_tanh", "gelu"
VISION_HEADS = 16
"""In 2024, whatever the tower's width: no tensor and no file tells."""
ROTARY_WIDTH = 32
"""In 2025, whatever the head's width."""
TEXT_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
"""Of the original's PhiConfig, which config.json leaves out."""
OLD_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_act": "activation_function",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
"""What 2024-03-04 calls them."""
UNKNOWN_TEXT = {"rope_scaling": None, "qk_layernorm": False, "tie_word_embeddings": False}
"""Fields that every release has at these values, and no other can be converted."""
DEFAULTS_2025: dict[str, dict[str, Any]] = {
    "text": {"n_heads": 32, "max_context": 2048},
    "vision": {"enc_n_heads": 16, "max_crops": 12, "overlap_margin": 4},
    "tokenizer": {},
}
"""Of the original's dataclasses, which the released config.json leaves out."""


@dataclass(frozen=True)
class Sizes:
    """What shapes tell. `key_rows` are the rows of one of key and value."""

    rows: int
    width: int
    layers: int
    mlp: int
    key_rows: int
    vision_width: int
    vision_layers: int
    vision_mlp: int
    patch: int
    positions: int
    projector: int
    views: int

    @property
    def side(self) -> int:
        """Pixels of a view's side."""
        return math.isqrt(self.positions) * self.patch


Tensors = Mapping[str, TensorRef]

_NAMES: Mapping[Keys, Mapping[str, str]] = {
    "2024": {
        "embedding": "text_model.transformer.embd.wte.weight",
        "text": "text_model.transformer.h.",
        "qkv": "mixer.Wqkv.weight",
        "patches": "vision_encoder.encoder.model.visual.patch_embed.linear.weight",
        "positions": "vision_encoder.encoder.model.visual.pos_embed",
        "vision": "vision_encoder.encoder.model.visual.blocks.",
    },
    "2025": {
        "embedding": "text.wte",
        "text": "text.blocks.",
        "qkv": "attn.qkv.weight",
        "patches": "vision.patch_emb.weight",
        "positions": "vision.pos_emb",
        "vision": "vision.blocks.",
    },
}


def read_sizes(tensors: Tensors, keys: Keys) -> Sizes:
    """The model's sizes. Raises ConfigurationError for what is no moondream2, naming the tensor."""
    names = _NAMES[keys]
    rows, width = _shape(tensors, names["embedding"], 2)
    qkv, _ = _shape(tensors, f"{names['text']}0.{names['qkv']}", 2)
    mlp, _ = _shape(tensors, f"{names['text']}0.mlp.fc1.weight", 2)
    vision_width, patch_values = _shape(tensors, names["patches"], 2)
    _, positions, _ = _shape(tensors, names["positions"], 3)
    vision_mlp, _ = _shape(tensors, f"{names['vision']}0.mlp.fc1.weight", 2)
    projector, seen = _shape(tensors, PROJECTOR_INPUT[keys], 2)
    patch = math.isqrt(patch_values // 3)
    if 3 * patch * patch != patch_values:
        raise ConfigurationError(f"{names['patches']} takes {patch_values} values, which are no square of 3 colours.")
    if math.isqrt(positions) ** 2 != positions:
        raise ConfigurationError(f"{names['positions']} has {positions} positions, which are no square of patches.")
    if seen not in (vision_width, 2 * vision_width):
        raise ConfigurationError(
            f"{PROJECTOR_INPUT[keys]} takes {seen} features; the vision tower gives {vision_width}, of one view, or "
            f"{2 * vision_width}."
        )
    if qkv <= width or (qkv - width) % 2:
        raise ConfigurationError(f"{names['text']}0.{names['qkv']} has {qkv} rows, for a width of {width}.")
    return Sizes(
        rows=rows,
        width=width,
        layers=_layers(tensors, names["text"], names["qkv"]),
        mlp=mlp,
        key_rows=(qkv - width) // 2,
        vision_width=vision_width,
        vision_layers=_layers(tensors, names["vision"], "attn.qkv.weight"),
        vision_mlp=vision_mlp,
        patch=patch,
        positions=positions,
        projector=projector,
        views=seen // vision_width,
    )


def _shape(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ConfigurationError(
            f"The checkpoint lacks {name}, so the model's sizes cannot be told. `weightport inspect` lists what is in "
            "it."
        )
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise ConfigurationError(f"{name} has the shape {list(shape)}; expected {axes} axes, none of them empty.")
    return shape


def _layers(tensors: Tensors, before: str, name: str) -> int:
    count = 0
    while f"{before}{count}.{name}" in tensors:
        count += 1
    return count


def merge_of(sizes: Sizes, keys: Keys, region: str | None) -> Merge:
    """What the revision makes of a picture's views, as far as tensors tell."""
    if sizes.views == 1:
        return "none"
    return "tiles" if keys == "2025" or region == "coordinates" else "grid"


def region_of(tensors: Tensors) -> str | None:
    """The kind of region head that the tensors are of."""
    known = {
        "region_model.position_features.weight": "points",
        "region_model.coordinate_features.weight": "coordinates",
        "region.coord_features": "bins",
    }
    return next((kind for name, kind in known.items() if name in tensors), None)


def native_config(
    sizes: Sizes,
    stated: Mapping[str, Any],
    tensors: Tensors,
    revision: Revision,
    special: Mapping[str, int | None],
    image_token_id: int,
    reasoning: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """The configuration of MoondreamForConditionalGeneration.

    `stated` is config.json, `special` are the ids `bos`, `eos` and, where the revision has one, `answer` (None where
    nothing tells), `reasoning` is `reasoning_config`. Raises ConfigurationError for what contradicts the tensors.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PhiConfig, SiglipVisionConfig

    from weightport.modeling.moondream.configuration_moondream import MoondreamConfig

    text, vision, margin = _of_2025(sizes, stated) if revision.keys == "2025" else _of_2024(sizes, stated)
    rotary = {name: text.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    ids: dict[str, Any] = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": None}
    try:
        return MoondreamConfig(
            text_config=PhiConfig(
                **text, **ids, tie_word_embeddings=False, rope_parameters={"rope_type": "default", **rotary}
            ),
            vision_config=SiglipVisionConfig(
                hidden_size=sizes.vision_width,
                intermediate_size=sizes.vision_mlp,
                num_hidden_layers=sizes.vision_layers,
                num_attention_heads=vision,
                image_size=sizes.side,
                patch_size=sizes.patch,
                hidden_act=EXACT if revision.exact_gelu else TANH,
                layer_norm_eps=revision.vision_epsilon,
                vision_use_head=False,
            ),
            projector_hidden_size=sizes.projector,
            projector_hidden_act=EXACT if revision.exact_gelu else TANH,
            image_token_id=image_token_id,
            feature_merge=revision.merge,
            overlap_margin=margin,
            prefix_bidirectional=revision.merge == "tiles",
            region_config=_region(tensors, revision),
            answer_token_id=special.get("answer"),
            reasoning_config=dict(reasoning) if reasoning and special.get("answer") is not None else None,
            **ids,
        )
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigurationError(f"No native model has these sizes: {error}") from error


def _of_2024(sizes: Sizes, stated: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """(fields of PhiConfig, heads of the vision tower, overlap of tiles)."""
    own = stated.get("text_config", stated.get("phi_config"))
    own = own if isinstance(own, Mapping) else {}
    if "n_embd" in own:
        own = _renamed(own)
    wrong = [f"{name} is {own[name]!r}" for name, value in UNKNOWN_TEXT.items() if own.get(name, value) != value]
    found = {
        "vocab_size": sizes.rows,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
    }
    wrong += [
        f"{name} is {own[name]!r}, but the tensors show {value}"
        for name, value in found.items()
        if own.get(name, value) != value
    ]
    values = {name: own.get(name, default) for name, default in TEXT_DEFAULTS.items()}
    heads = values["num_attention_heads"]
    if type(heads) is not int or heads < 1 or sizes.width % heads:
        wrong.append(f"num_attention_heads is {heads!r}, which does not divide the width of {sizes.width}")
    if sizes.key_rows != sizes.width:
        wrong.append(f"the tensors show keys of {sizes.key_rows} rows; in 2024 every head has keys of its own")
    _refuse("config.json", wrong)
    _check_vision_heads(sizes, VISION_HEADS)
    return {**found, **values, "num_key_value_heads": heads}, VISION_HEADS, 4


def _renamed(old: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: old[was] for name, was in OLD_NAMES.items() if old.get(was) is not None}
    rotary, width, heads = old.get("rotary_dim"), old.get("n_embd"), old.get("n_head")
    if rotary and width and heads:
        values["partial_rotary_factor"] = rotary / (width / heads)
    return values


def _of_2025(sizes: Sizes, stated: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """(fields of PhiConfig, heads of the vision tower, overlap of tiles)."""
    own = stated_2025(stated)
    text, vision = own["text"], own["vision"]
    shown = {
        "text": {
            "dim": sizes.width, "ff_dim": sizes.mlp, "n_layers": sizes.layers, "vocab_size": sizes.rows,
            "prefix_attn": sizes.positions + 1,
        },
        "vision": {
            "enc_dim": sizes.vision_width, "enc_patch_size": sizes.patch, "enc_n_layers": sizes.vision_layers,
            "enc_ff_dim": sizes.vision_mlp, "proj_inner_dim": sizes.projector, "proj_out_dim": sizes.width,
            "crop_size": sizes.side,
        },
    }  # fmt: skip
    wrong = [
        f"{section}.{name} is {own[section][name]!r}, but the tensors show {value}"
        for section, fields in shown.items()
        for name, value in fields.items()
        if own[section].get(name, value) != value
    ]
    heads = text["n_heads"]
    if type(heads) is not int or heads < 1 or sizes.width % heads:
        _refuse(
            "config.json", [*wrong, f"text.n_heads is {heads!r}, which does not divide the width of {sizes.width}"]
        )
    width = sizes.width // heads
    key_heads = text.get("n_kv_heads", sizes.key_rows // width)
    if key_heads * width != sizes.key_rows or key_heads < 1 or heads % key_heads:
        wrong.append(f"text.n_kv_heads is {key_heads}, but the tensors show keys of {sizes.key_rows} rows")
    if width < ROTARY_WIDTH:
        wrong.append(f"text.n_heads is {heads}: heads of {width} are narrower than the rotary part, {ROTARY_WIDTH}")
    _refuse("config.json", wrong)
    _check_vision_heads(sizes, vision["enc_n_heads"])
    fields = {
        "vocab_size": sizes.rows, "hidden_size": sizes.width, "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "hidden_act": TEXT_DEFAULTS["hidden_act"], "max_position_embeddings": text["max_context"],
        "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": ROTARY_WIDTH / width,
    }  # fmt: skip
    return fields, vision["enc_n_heads"], vision["overlap_margin"]


def stated_2025(stated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What config.json says of a model of 2025, section by section, with the original's defaults."""
    own = stated.get("config")
    own = own if isinstance(own, Mapping) else {}
    return {
        section: {**defaults, **(own[section] if isinstance(own.get(section), Mapping) else {})}
        for section, defaults in DEFAULTS_2025.items()
    }


def with_mlp(stated: Mapping[str, Any], width: int, grown: int) -> Mapping[str, Any]:
    """`stated`, which says that the text model's two-layer networks have `width` units, of one that `grown` were added
    to. What says otherwise, or nothing, stays as it is."""
    own = stated.get("config")
    text = own.get("text") if isinstance(own, Mapping) else None
    if not grown or not isinstance(own, Mapping) or not isinstance(text, Mapping) or text.get("ff_dim") != width:
        return stated
    return {**stated, "config": {**own, "text": {**text, "ff_dim": width + grown}}}


def _check_vision_heads(sizes: Sizes, heads: Any) -> None:
    if type(heads) is not int or heads < 1 or sizes.vision_width % heads:
        raise ConfigurationError(
            f"The vision tower is {sizes.vision_width} wide, which is no multiple of its {heads!r} heads."
        )


def _region(tensors: Tensors, revision: Revision) -> dict[str, Any] | None:
    kind = region_of(tensors)
    if kind is None:
        return None
    if kind == "points":
        return {"kind": "points", "feature_dim": 2 * _shape(tensors, "region_model.position_features.weight", 2)[0]}
    names = (
        {"coord": "region_model.coordinate_", "size": "region_model.size_"}
        if kind == "coordinates"
        else {"coord": "region.coord_", "size": "region.size_"}
    )
    return {
        "kind": "bins",
        "coord_feat_dim": _shape(tensors, f"{names['coord']}encoder.weight", 2)[1],
        "coord_out_dim": _shape(tensors, f"{names['coord']}decoder.fc2.weight", 2)[0],
        "size_feat_dim": _shape(tensors, f"{names['size']}encoder.weight", 2)[1],
        "size_out_dim": _shape(tensors, f"{names['size']}decoder.fc2.weight", 2)[0],
        "inner_dim": _shape(tensors, f"{names['coord']}decoder.fc1.weight", 2)[0],
        "size_scale": revision.size_scale,
    }


def _refuse(where: str, wrong: list[str]) -> None:
    if wrong:
        raise ConfigurationError(f"{where} does not fit the checkpoint:\n      " + "\n      ".join(wrong))
