"""The native configuration of a BLIP-2: from the shapes of all sources, and what these do not tell.

Sources of the numbers: salesforce/LAVIS at 506965b9 (eva_vit.create_eva_vit_g, blip2.Blip2Base, Qformer, blip2_opt,
blip2_t5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import TensorRef
from weightport.errors import ConfigurationError, UsageError
from weightport.families.blip2.layouts import PROJECTION, VISION, Found, Kind, Tower
from weightport.families.blip2.options import Blip2Options
from weightport.families.blip2.tokenizers import SpecialIds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VISION_EPS, CLIP_EPS, LN_VISION_EPS = 1e-6, 1e-5, 1e-5
"""Of the norms in the blocks of EVA's ViT-g and CLIP's ViT-L, and of the trained norm behind either."""
RELEASED_HEADS = 16
"""Of both released vision encoders; no shape tells."""
RELEASED_LAYERS = {1408: 39, 1024: 23}
"""Blocks in use, by width: the released files have one more, which LAVIS does not build."""
QFORMER_HEAD = 64
IMAGE_SIZE = 224
LANGUAGE_WIDTHS: Mapping[Kind, Mapping[int, str]] = {
    "opt": {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"},
    "t5": {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"},
}


@dataclass(frozen=True)
class VisionSizes:
    """The vision encoder's: `grid` patches a side in the source's position table, `image_size` pixels a side,
    `surplus` beginnings of the names of blocks that LAVIS does not build."""

    tower: Tower
    width: int
    layers: int
    surplus: tuple[str, ...]
    heads: int
    mlp: int
    patch: int
    grid: int
    image_size: int

    @property
    def target_grid(self) -> int:
        return self.image_size // self.patch


@dataclass(frozen=True)
class QFormerSizes:
    """The Q-Former's, and the image-text projection's (None where there is none)."""

    queries: int
    width: int
    layers: int
    heads: int
    mlp: int
    frequency: int
    positions: int
    vocabulary: int
    projection: int | None


@dataclass(frozen=True)
class _TowerNames:
    """What tells a vision encoder's sizes: tensors below `visual_encoder.`."""

    start: str
    patches: str
    positions: str
    block: str
    mlp: str


NAMES: Mapping[Tower, _TowerNames] = {
    "eva": _TowerNames("cls_token", "patch_embed.proj.weight", "pos_embed", "blocks.{}.norm1.weight",
                       "blocks.0.mlp.fc1.weight"),
    "clip": _TowerNames("class_embedding", "conv1.weight", "positional_embedding",
                        "transformer.resblocks.{}.ln_1.weight", "transformer.resblocks.0.mlp.c_fc.weight"),
}  # fmt: skip


def read_vision(tensors: Mapping[str, TensorRef], found: Found, options: Blip2Options) -> VisionSizes:
    """The vision encoder's sizes. Raises ConfigurationError for what does not fit, UsageError for options that
    contradict it."""
    tower: Tower = "clip" if "visual_encoder.class_embedding" in tensors else "eva"
    names = NAMES[tower]
    width = _shape(tensors, VISION + names.start, 1 if tower == "clip" else 3)[-1]
    norm = _shape(tensors, "ln_vision.weight", 1)[0]
    if width != norm:
        raise ConfigurationError(
            f"The vision encoder is {width} wide, but the checkpoint's ln_vision.weight {norm}: it was trained with "
            "another one. --vision takes the file that belongs to it."
        )
    _, colours, patch, _ = _shape(tensors, VISION + names.patches, 4)
    positions = _shape(tensors, VISION + names.positions, 2 if tower == "clip" else 3)[-2]
    grid = math.isqrt(positions - 1)
    if grid**2 != positions - 1 or colours != 3:
        raise ConfigurationError(
            f"{VISION}{names.positions} has {positions} positions: no class and square of patches."
        )
    blocks = _numbered(tensors, re.escape(VISION + names.block).replace(r"\{\}", r"(\d+)"))
    whole = found.has_vision or RELEASED_LAYERS.get(width) == blocks
    layers = options.vision_layers or (blocks if whole else blocks - 1)
    if not 0 < layers <= blocks:
        raise UsageError(f"--vision-layers {layers}: the vision encoder has {blocks} blocks.")
    heads = options.vision_heads or RELEASED_HEADS
    if width % heads:
        raise UsageError(f"The vision encoder's width {width} is no multiple of {heads} heads: say --vision-heads.")
    return VisionSizes(
        tower=tower,
        width=width,
        layers=layers,
        surplus=tuple(f"{VISION}{names.block.partition('{')[0]}{number}." for number in range(layers, blocks)),
        heads=heads,
        mlp=_shape(tensors, VISION + names.mlp, 2)[0],
        patch=patch,
        grid=grid,
        image_size=_image_size(found, options, grid, patch),
    )


def _image_size(found: Found, options: Blip2Options, grid: int, patch: int) -> int:
    own, stated = grid * patch, found.settings.get("image_size")
    if found.has_vision:
        if options.image_size not in (0, own):
            raise UsageError(f"--image-size {options.image_size}: the checkpoint's vision encoder is of {own} px.")
        return own
    size = options.image_size or (stated if type(stated) is int else IMAGE_SIZE)
    if size < patch:
        raise UsageError(f"--image-size {size} is smaller than a patch of {patch} px.")
    return size


def read_qformer(tensors: Mapping[str, TensorRef], options: Blip2Options, bert: Mapping[str, Any]) -> QFormerSizes:
    """The Q-Former's sizes; `bert` is the config.json of its BERT, empty where there is none. Raises
    ConfigurationError."""
    layer = "Qformer.bert.encoder.layer."
    _, queries, width = _shape(tensors, "query_tokens", 3)
    count = _numbered(tensors, r"Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.self\.query\.weight")
    crossing = [n for n in range(count) if f"{layer}{n}.crossattention.self.query.weight" in tensors]
    frequency = crossing[1] if len(crossing) > 1 else max(count, 1)
    if crossing != list(range(0, count, frequency)):
        raise ConfigurationError(f"The Q-Former sees the image in the layers {crossing}, which are no even steps.")
    stated = bert.get("num_attention_heads") if bert.get("hidden_size") == width else None
    heads = options.qformer_heads or stated or width // QFORMER_HEAD
    if not heads or width % heads:
        raise UsageError(
            f"The Q-Former's width {width} is no multiple of {heads or QFORMER_HEAD}: say --qformer-heads."
        )
    words = tensors.get("Qformer.bert.embeddings.word_embeddings.weight")
    table = tensors.get("Qformer.bert.embeddings.position_embeddings.weight")
    numbers = tensors.get("Qformer.bert.embeddings.position_ids")
    projection = tensors.get("vision_proj.weight")
    return QFormerSizes(
        queries=queries,
        width=width,
        layers=count,
        heads=heads,
        mlp=_shape(tensors, f"{layer}0.intermediate_query.dense.weight", 2)[0],
        frequency=frequency,
        positions=table.shape[0] if table else numbers.shape[-1] if numbers else 512,
        vocabulary=words.shape[0] if words else int(bert.get("vocab_size") or 30522),
        projection=projection.shape[0] if projection else None,
    )


def check_projection(tensors: Mapping[str, TensorRef], kind: Kind, width: int, folder: str) -> None:
    """Raise ConfigurationError unless the language model's embedding is as wide as the projection to it."""
    rows = _shape(tensors, PROJECTION[kind], 2)[0]
    if rows != width:
        known = LANGUAGE_WIDTHS[kind].get(rows)
        raise ConfigurationError(
            f"{PROJECTION[kind]} projects to {rows} values, but the language model in {folder} is {width} wide."
            + (f"\n  The checkpoint belongs to {known}." if known else "")
        )


def native_config(
    kind: Kind,
    vision: VisionSizes,
    qformer: QFormerSizes,
    language: Mapping[str, Any] | None,
    special: SpecialIds,
    *,
    exact: bool,
) -> PreTrainedConfig:
    """The Blip2Config of the model, or of `exact` our own, which has an epsilon for the norm behind the encoder.
    Raises ConfigurationError for sizes that transformers does not take."""
    from transformers import Blip2Config

    from weightport.modeling.blip2_lavis.configuration_blip2_lavis import Blip2LavisConfig

    own: dict[str, Any] = {"image_text_hidden_size": qformer.projection} if qformer.projection else {}
    if exact:
        own["ln_vision_eps"] = LN_VISION_EPS
    config_class = Blip2LavisConfig if exact else Blip2Config
    tower = {"model_type": "blip_2_vision_model", "layer_norm_eps": VISION_EPS, "hidden_act": "gelu"}
    if vision.tower == "clip":
        tower = {"model_type": "clip_vision_model", "layer_norm_eps": CLIP_EPS, "hidden_act": "quick_gelu"}
    try:
        return config_class(
            vision_config={
                **tower,
                "hidden_size": vision.width,
                "intermediate_size": vision.mlp,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
                "image_size": vision.target_grid * vision.patch,
                "patch_size": vision.patch,
            },
            qformer_config={
                "model_type": "blip_2_qformer",
                "hidden_size": qformer.width,
                "num_hidden_layers": qformer.layers,
                "num_attention_heads": qformer.heads,
                "intermediate_size": qformer.mlp,
                "cross_attention_frequency": qformer.frequency,
                "max_position_embeddings": qformer.positions,
                "vocab_size": qformer.vocabulary,
                "use_qformer_text_input": kind == "itm",
            },
            text_config=_words_of_qformer(qformer, special)
            if kind == "itm"
            else _language(kind, language or {}, special),
            num_query_tokens=qformer.queries,
            image_token_index=special.image,
            **own,
        )
    except ValueError as error:
        raise ConfigurationError(f"transformers has no model of these sizes: {error}") from error


def _language(kind: Kind, config: Mapping[str, Any], special: SpecialIds) -> dict[str, Any]:
    """The language model's own configuration, with what LAVIS changes of it."""
    left_out = ("_name_or_path", "architectures", "torch_dtype", "dtype", "transformers_version", "prefix")
    kept = {key: value for key, value in config.items() if key not in left_out}
    if kind == "t5":
        # LAVIS computes the exact GELU where Flan-T5 has an approximation.
        return {**kept, "dense_act_fn": "gelu", "bos_token_id": special.bos}
    return {**kept, "eos_token_id": special.end}


def _words_of_qformer(qformer: QFormerSizes, special: SpecialIds) -> dict[str, Any]:
    """Blip2ForImageTextRetrieval has no language model; what tools ask of one is the Q-Former's."""
    return {
        "model_type": "opt",
        "hidden_size": qformer.width,
        "word_embed_proj_dim": qformer.width,
        "ffn_dim": qformer.mlp,
        "num_attention_heads": qformer.heads,
        "num_hidden_layers": qformer.layers,
        "max_position_embeddings": qformer.positions,
        "vocab_size": qformer.vocabulary,
        "bos_token_id": special.bos,
        "eos_token_id": special.end,
        "pad_token_id": special.pad,
    }


def _shape(tensors: Mapping[str, TensorRef], name: str, axes: int) -> tuple[int, ...]:
    """The shape of `name`, which has so many axes. Raises ConfigurationError."""
    if name not in tensors:
        raise ConfigurationError(
            f"No source holds {name}, so the model's sizes cannot be told. `weightport inspect` lists what is in a "
            "file."
        )
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise ConfigurationError(f"{name} has the shape {list(shape)}; expected {axes} axes, none of them empty.")
    return shape


def _numbered(tensors: Mapping[str, TensorRef], name: str) -> int:
    """How many layers there are: one more than the highest number in a name. Raises ConfigurationError for gaps."""
    numbers = {int(match[1]) for each in tensors if (match := re.fullmatch(name, each))}
    if numbers != set(range(len(numbers))) or not numbers:
        shown = name.replace("\\", "").replace("(d+)", "N")
        raise ConfigurationError(f"The layers of {shown} are numbered {sorted(numbers)[:8]}; expected 0 and on.")
    return len(numbers)
