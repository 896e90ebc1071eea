"""Florence2Config from a checkpoint: sizes from the tensors' shapes, the rest from config.json beside it.

What shapes say is never asked of config.json; where both speak and contradict each other the checkpoint is refused.
What only config.json can say of the vision tower (heads, groups, windows, strides) has no default here: the native
class would fall back to those of the base size in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from weightport.checkpoints import TensorRef
from weightport.converters.layer_count import count_layers
from weightport.errors import CheckpointError, ConfigurationError
from weightport.families.florence2.embeddings import Embedding
from weightport.families.florence2.rules import TEMPORAL_EMBEDDING

if TYPE_CHECKING:
    from transformers import Florence2Config

Tensors = Mapping[str, TensorRef]

POSITION_OFFSET = 2  # BART's learned positions begin at row 2
FEATURE_SOURCES = ["spatial_avg_pool", "temporal_avg_pool"]
SIZE_NAMES = {(768, 6, 6): "base", (1024, 12, 12): "large"}


@dataclass(frozen=True)
class ShapeFact:
    """A field that the tensors determine: its native name, its place in the original's config.json, how to read it."""

    field: str
    original: str
    read: Callable[[Tensors], Any]


def _axis(name: str, axis: int, less: int = 0) -> Callable[[Tensors], int]:
    def read(tensors: Tensors) -> int:
        ref = tensors.get(name)
        if ref is None or len(ref.shape) <= axis:
            found = "is not in the checkpoint" if ref is None else f"has the shape {list(ref.shape)}"
            raise ConfigurationError(f"{name} {found}; the model's sizes cannot be told without it.")
        return ref.shape[axis] - less

    return read


def _count(pattern: str) -> Callable[[Tensors], int]:
    return partial(count_layers, re.compile(pattern))


_stages = _count(r"vision_tower\.convs\.(\d+)\.")


def _per_stage(read: Callable[[Tensors, int], Any]) -> Callable[[Tensors], list[Any]]:
    return lambda tensors: [read(tensors, stage) for stage in range(_stages(tensors))]


def _prenorm(tensors: Tensors, stage: int) -> bool | None:
    """Whether a stage normalises what comes in; None where both sides have the same width."""
    name = f"vision_tower.convs.{stage}"
    out, into = (_axis(f"{name}.proj.weight", axis)(tensors) for axis in (0, 1))
    width = _axis(f"{name}.norm.weight", 0)(tensors)
    return None if out == into else width == into


VISION_SHAPES = (
    ShapeFact("embed_dim", "dim_embed", _per_stage(lambda t, i: _axis(f"vision_tower.convs.{i}.proj.weight", 0)(t))),
    ShapeFact("patch_size", "patch_size", _per_stage(lambda t, i: _axis(f"vision_tower.convs.{i}.proj.weight", 2)(t))),
    ShapeFact("depths", "depths", _per_stage(lambda t, i: _count(rf"vision_tower\.blocks\.{i}\.(\d+)\.")(t))),
    ShapeFact("projection_dim", "projection_dim", _axis("image_projection", 1)),
)
POSITIONS = ShapeFact(
    "max_position_embeddings", "max_pos_embeddings", _axis("image_pos_embed.row_embeddings.weight", 0)
)
TEMPORAL = ShapeFact("max_temporal_embeddings", "max_temporal_embeddings", _axis(TEMPORAL_EMBEDDING, 0))

_TEXT = "language_model.model."
TEXT_SHAPES = (
    ShapeFact("encoder_layers", "encoder_layers", _count(rf"{re.escape(_TEXT)}encoder\.layers\.(\d+)\.")),
    ShapeFact("decoder_layers", "decoder_layers", _count(rf"{re.escape(_TEXT)}decoder\.layers\.(\d+)\.")),
    ShapeFact("encoder_ffn_dim", "encoder_ffn_dim", _axis(f"{_TEXT}encoder.layers.0.fc1.weight", 0)),
    ShapeFact("decoder_ffn_dim", "decoder_ffn_dim", _axis(f"{_TEXT}decoder.layers.0.fc1.weight", 0)),
    ShapeFact(
        "max_position_embeddings",
        "max_position_embeddings",
        _axis(f"{_TEXT}encoder.embed_positions.weight", 0, POSITION_OFFSET),
    ),
)

# Per stage, and told by config.json alone.
STAGE_FIELDS = ("patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups")

# text_config's fields that no shape tells, with the defaults of the original's configuration class.
TEXT_DEFAULTS: dict[str, Any] = {
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "classifier_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.02,
    "scale_embedding": False,
    "use_cache": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
DROP_PATH_DEFAULT = 0.1


@dataclass(frozen=True)
class Sizes:
    """The native configuration's values, and what is to be said about how they were found."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    notes: tuple[str, ...]


def read_sizes(tensors: Tensors, config: Any, embedding: Embedding) -> Sizes:
    """The native values. Raises ConfigurationError naming every field that is missing, wrong or cannot be held."""
    vision, text = _sections(config)
    notes: list[str] = []
    wrong = [*_unknown_kinds(config, vision, text)]
    if wrong:
        raise ConfigurationError("config.json asks for what the native model cannot hold:" + _listed(wrong))
    vision_values = _vision(tensors, vision, notes, wrong)
    text_values = _text(tensors, text, embedding, notes, wrong)
    if wrong:
        raise ConfigurationError(
            "config.json and the checkpoint's tensors do not belong together, or config.json is incomplete:"
            + _listed(wrong)
        )
    _check_divisions(vision_values, text_values)
    notes += _wrong_ids(config, text_values)
    return Sizes(vision_values, text_values, tuple(notes))


def native_config(sizes: Sizes, *, tied: bool, image_token_id: int, appended: int) -> Florence2Config:
    """The configuration of Florence2ForConditionalGeneration, as transformers itself validates it."""
    from transformers import Florence2Config

    text = {**sizes.text, "vocab_size": sizes.text["vocab_size"] + appended}
    ids = {name: text[name] for name in (*TOKEN_IDS, "forced_eos_token_id")}
    extra = {"original_vocab_size": sizes.text["vocab_size"]} if appended else {}
    try:
        return Florence2Config(
            vision_config={"model_type": "florence_vision", **sizes.vision},
            text_config={"model_type": "bart", **text},
            image_token_id=image_token_id,
            tie_word_embeddings=tied,
            is_encoder_decoder=True,
            **ids,
            **extra,
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigurationError(f"config.json holds values that transformers does not accept: {error}") from error


def size_name(sizes: Sizes) -> str:
    """base, large, or custom."""
    text = sizes.text
    key = (text["d_model"], text["encoder_layers"], text["decoder_layers"])
    return SIZE_NAMES.get(key, f"custom (width {text['d_model']})")


def _sections(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(config, Mapping):
        raise CheckpointError("config.json should hold a JSON object; found " + type(config).__name__ + ".")
    if config.get("model_type", "florence2") != "florence2":
        raise ConfigurationError(
            f"config.json is of a {config['model_type']!r} model, the tensors are Florence-2's. Put the checkpoint's "
            "own config.json beside it."
        )
    sections = [config.get(name) for name in ("vision_config", "text_config")]
    if not all(isinstance(section, Mapping) for section in sections):
        raise ConfigurationError("config.json lacks vision_config or text_config; both are needed.")
    return sections[0], sections[1]  # type: ignore[return-value]


def _unknown_kinds(config: Any, vision: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """What the original's code knows, or names, and the native model cannot do."""
    wrong = []
    if vision.get("model_type", "davit") not in ("davit", "", None):
        wrong.append(f"vision_config.model_type is {vision['model_type']!r}; the vision tower is davit")
    if text.get("model_type", "florence2_language") not in ("florence2_language", "", None):
        wrong.append(f"text_config.model_type is {text['model_type']!r}; the language model is florence2_language")
    for field, known, what in (
        ("image_pos_embed", "learned_abs_2d", "position embedding"),
        ("visual_temporal_embedding", "COSINE", "temporal embedding"),
    ):
        section = vision.get(field)
        if not isinstance(section, Mapping):
            wrong.append(f"vision_config.{field} is {section!r}; expected its type ({known}) and size")
        elif section.get("type") != known:
            wrong.append(f"vision_config.{field}.type is {section.get('type')!r}; the native {what} is {known}")
    if vision.get("image_feature_source") != FEATURE_SOURCES:
        wrong.append(
            f"vision_config.image_feature_source is {vision.get('image_feature_source')!r}; the native model has "
            f"{FEATURE_SOURCES} in this order"
        )
    if text.get("scale_embedding"):
        wrong.append(
            "text_config.scale_embedding is true; the original does not scale on its path, the native model would"
        )
    activation = text.get("activation_function", TEXT_DEFAULTS["activation_function"])
    if not _is_activation(activation):
        wrong.append(f"text_config.activation_function is {activation!r}, which transformers does not have")
    return wrong


def _is_activation(name: Any) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(name, str) and name in ACT2FN


def _vision(tensors: Tensors, vision: Mapping[str, Any], notes: list[str], wrong: list[str]) -> dict[str, Any]:
    values = {}
    for fact in VISION_SHAPES:
        values[fact.field] = _agreed(fact, tensors, vision, "vision_config", wrong)
    values[POSITIONS.field] = _agreed(
        POSITIONS, tensors, vision["image_pos_embed"], "vision_config.image_pos_embed", wrong
    )
    temporal = vision["visual_temporal_embedding"]
    if TEMPORAL_EMBEDDING in tensors:
        values[TEMPORAL.field] = _agreed(TEMPORAL, tensors, temporal, "vision_config.visual_temporal_embedding", wrong)
    elif _is_size(temporal.get("max_temporal_embeddings")):
        values[TEMPORAL.field] = temporal["max_temporal_embeddings"]
        notes.append(f"{TEMPORAL_EMBEDDING} is not in the file; it is a constant, and was computed.")
    else:
        wrong.append("vision_config.visual_temporal_embedding.max_temporal_embeddings is missing")
    stages = _stages(tensors)
    for field in STAGE_FIELDS:
        stated = vision.get(field)
        kind = bool if field == "patch_prenorm" else int
        if field not in vision:
            wrong.append(f"vision_config.{field} is missing; tensors do not tell it, and a default could be wrong")
        elif (
            not isinstance(stated, (list, tuple)) or len(stated) != stages or not all(type(v) is kind for v in stated)
        ):
            wrong.append(f"vision_config.{field} is {stated!r}; expected {stages} values, one a stage")
        else:
            values[field] = list(stated)
    for stage, stated in enumerate(values.get("patch_prenorm", ())):
        told = _prenorm(tensors, stage)
        if told is not None and told != stated:
            wrong.append(f"vision_config.patch_prenorm[{stage}] is {stated}; the norm's width shows {told}")
    if not _is_size(vision.get("window_size")):
        found = f"is {vision['window_size']!r}" if "window_size" in vision else "is missing"
        wrong.append(f"vision_config.window_size {found}; tensors do not tell it, and a default could be wrong")
    values["window_size"] = vision.get("window_size")
    if "drop_path_rate" not in vision:
        notes.append(
            f"vision_config.drop_path_rate is missing; the original's default of {DROP_PATH_DEFAULT} was taken."
        )
    values["drop_path_rate"] = vision.get("drop_path_rate", DROP_PATH_DEFAULT)
    return values


def _text(
    tensors: Tensors, text: Mapping[str, Any], embedding: Embedding, notes: list[str], wrong: list[str]
) -> dict[str, Any]:
    facts = (
        ShapeFact("vocab_size", "vocab_size", lambda _: embedding.rows),
        ShapeFact("d_model", "d_model", lambda _: embedding.width),
        *TEXT_SHAPES,
    )
    values = {fact.field: _agreed(fact, tensors, text, "text_config", wrong) for fact in facts}
    heads = [field for field in ("encoder_attention_heads", "decoder_attention_heads") if field not in text]
    if heads:
        notes.append(f"text_config.{', '.join(heads)} is missing; the original's default of 16 was taken.")
    for field, default in TEXT_DEFAULTS.items():
        values[field] = text.get(field, default)
    for field in ("encoder_attention_heads", "decoder_attention_heads"):
        if not _is_size(values[field]):
            wrong.append(f"text_config.{field} is {values[field]!r}; expected a number of heads")
    for field in TOKEN_IDS:
        if type(values[field]) is not int or not 0 <= values[field] < embedding.rows:
            wrong.append(f"text_config.{field} is {values[field]!r}; expected an id below {embedding.rows}")
    return values


def _agreed(fact: ShapeFact, tensors: Tensors, section: Mapping[str, Any], where: str, wrong: list[str]) -> Any:
    """What the tensors show; a contradiction by config.json is added to `wrong`."""
    value = fact.read(tensors)
    stated = section.get(fact.original)
    if stated is not None and (list(stated) if isinstance(stated, (list, tuple)) else stated) != value:
        wrong.append(f"{where}.{fact.original} is {stated!r}, but the tensors show {value!r}")
    return value


def _check_divisions(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raise ConfigurationError unless every width divides into its heads and groups."""
    wrong = [
        f"vision_config.{field}[{stage}] is {parts}, which does not divide the stage's width of {width}"
        for field in ("num_heads", "num_groups")
        for stage, (width, parts) in enumerate(zip(vision["embed_dim"], vision[field]))
        if parts < 1 or width % parts
    ]
    wrong += [
        f"text_config.{field} is {text[field]}, which does not divide d_model ({text['d_model']})"
        for field in ("encoder_attention_heads", "decoder_attention_heads")
        if text["d_model"] % text[field]
    ]
    wrong += [f"vision_config.patch_stride[{i}] is {s}" for i, s in enumerate(vision["patch_stride"]) if s < 1]
    wrong += [f"vision_config.patch_padding[{i}] is {p}" for i, p in enumerate(vision["patch_padding"]) if p < 0]
    if vision["projection_dim"] != text["d_model"]:
        wrong.append(
            f"image_projection gives vectors of {vision['projection_dim']}, the language model takes {text['d_model']}"
        )
    if wrong:
        raise ConfigurationError("config.json does not fit the checkpoint's tensors:" + _listed(wrong))


def _wrong_ids(config: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    ids = ("bos_token_id", "pad_token_id", "eos_token_id")
    differing = [f"{name} {config[name]}" for name in ids if config.get(name) not in (None, text[name])]
    if not differing:
        return []
    return [
        f"config.json has {', '.join(differing)} at its top, which the original ignores; text_config's ids were taken."
    ]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _listed(lines: list[str]) -> str:
    return "\n      " + "\n      ".join(lines)
