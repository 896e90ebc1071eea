"""Florence-2: the remote code's names on the left, transformers' on the right.

Source of the left side: microsoft/Florence-2-large at f0acedb, modeling_florence2.py (the same names in every
revision). Nothing is split; one matrix is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from weightport.converters.operations import COPY, Operation, Pad
from weightport.converters.patterns import Pattern
from weightport.converters.rules import Rule, RuleTable, computed, derive, drop, move, permute, renames, table

_BLOCKS = "vision_tower.blocks.*.*."

VISION_TOWER = table(
    renames(
        "vision_tower.",
        "model.vision_tower.",
        """
        convs.*.proj.{weight,bias}                convs.*.conv.{weight,bias}
        convs.*.norm.{weight,bias}
        """,
    ),
    renames(
        _BLOCKS + "spatial_block.window_attn.",
        "model." + _BLOCKS + "spatial_block.",
        """
        norm.{weight,bias}                        norm1.{weight,bias}
        fn.{qkv,proj}.{weight,bias}               window_attn.{qkv,proj}.{weight,bias}
        """,
    ),
    renames(
        _BLOCKS + "channel_block.channel_attn.",
        "model." + _BLOCKS + "channel_block.",
        """
        norm.{weight,bias}                        norm1.{weight,bias}
        fn.{qkv,proj}.{weight,bias}               channel_attn.{qkv,proj}.{weight,bias}
        """,
    ),
    renames(
        _BLOCKS + "{spatial,channel}_block.",
        "model." + _BLOCKS + "{spatial,channel}_block.",
        """
        conv{1,2}.fn.dw.{weight,bias}             conv{1,2}.{weight,bias}
        ffn.norm.{weight,bias}                    norm2.{weight,bias}
        ffn.fn.net.fc{1,2}.{weight,bias}          ffn.fc{1,2}.{weight,bias}
        """,
    ),
)

TEMPORAL_EMBEDDING = "visual_temporal_embed.pos_idx_to_embed"

PROJECTOR = table(
    permute("image_projection", "model.multi_modal_projector.image_projection.weight"),
    renames(
        "",
        "model.multi_modal_projector.",
        """
        image_proj_norm.{weight,bias}
        image_pos_embed.{row,column}_embeddings.weight          image_position_embed.{row,column}_embeddings.weight
        """,
    ),
)


def temporal_embedding(shape: tuple[int, ...]) -> torch.Tensor:
    """The original's constant [positions, width]: sines in even columns, cosines in odd ones, base 10000."""
    positions, width = shape
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / half))
    angles = torch.arange(positions).float()[:, None] * frequencies[None, :]
    table = torch.empty(shape)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return table


TEMPORAL = table(move(TEMPORAL_EMBEDDING, f"model.multi_modal_projector.{TEMPORAL_EMBEDDING}"))
TEMPORAL_COMPUTED = table(
    computed(
        f"model.multi_modal_projector.{TEMPORAL_EMBEDDING}",
        temporal_embedding,
        because="not in the checkpoint; the original computes it too",
    )
)

LANGUAGE_MODEL = renames(
    "language_model.model.",
    "model.language_model.",
    """
    {encoder,decoder}.embed_positions.weight
    {encoder,decoder}.layernorm_embedding.{weight,bias}
    {encoder,decoder}.layers.*.self_attn.{q,k,v,out}_proj.{weight,bias}
    {encoder,decoder}.layers.*.self_attn_layer_norm.{weight,bias}
    decoder.layers.*.encoder_attn.{q,k,v,out}_proj.{weight,bias}
    decoder.layers.*.encoder_attn_layer_norm.{weight,bias}
    {encoder,decoder}.layers.*.fc{1,2}.{weight,bias}
    {encoder,decoder}.layers.*.final_layer_norm.{weight,bias}
    """,
)

SHARED = "language_model.model.shared.weight"
EMBEDDINGS = (
    SHARED,
    "language_model.model.encoder.embed_tokens.weight",
    "language_model.model.decoder.embed_tokens.weight",
)
HEAD = "language_model.lm_head.weight"
LOGITS_BIAS = "language_model.final_logits_bias"

NATIVE_EMBEDDING, NATIVE_HEAD = "model.language_model.shared.weight", "lm_head.weight"


def zero_bias(config: Any, name: str) -> torch.Tensor:
    """final_logits_bias: zeros [1, rows of the original's vocabulary], in the model's dtype."""
    return torch.zeros(1, original_rows(config), dtype=config.dtype or torch.float32)


def original_rows(config: Any) -> int:
    """Rows of the original's embedding; the native one has more where an image token was appended."""
    return getattr(config, "original_vocab_size", None) or config.text_config.vocab_size


BUFFERS = table(
    derive(LOGITS_BIAS, zero_bias, because="zeros, which change no logit", optional=False),
    drop("vision_tower.{norms,head}.{weight,bias}", because="the original's code deletes it before any use"),
)


def embedding_rules(names: Collection[str], *, tied: bool, appended: int) -> RuleTable:
    """The token embedding and the head. Of the names that one matrix goes by, the first that the file has is read and
    the others are compared with it."""
    one = [name for name in (*EMBEDDINGS, HEAD) if name in names] if tied else [n for n in EMBEDDINGS if n in names]
    source, *aliases = one or EMBEDDINGS
    operation: Operation = Pad(appended) if appended else COPY
    rules = [Rule((Pattern(source),), (Pattern(NATIVE_EMBEDDING),), operation, tuple(map(Pattern, aliases)))]
    if not tied:
        rules.append(Rule((Pattern(HEAD),), (Pattern(NATIVE_HEAD),), operation))
    return table(*rules)


def florence2_rules(config: Any, names: Collection[str] = (*EMBEDDINGS, HEAD, TEMPORAL_EMBEDDING)) -> RuleTable:
    """The table of the checkpoint whose native configuration is `config` and which has the tensors `names`: by default
    those of the released files, as far as it depends on them."""
    appended = config.text_config.vocab_size - original_rows(config)
    embeddings = embedding_rules(names, tied=config.tie_word_embeddings, appended=appended)
    temporal = TEMPORAL if TEMPORAL_EMBEDDING in names else TEMPORAL_COMPUTED
    return VISION_TOWER + PROJECTOR + temporal + embeddings + LANGUAGE_MODEL + BUFFERS
