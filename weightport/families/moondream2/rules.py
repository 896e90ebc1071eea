"""The mapping of moondream2, to be read beside the original: its names left, the native model's right.

Query, key and value are one matrix in the original, the query's rows first. Positions have a batch axis there, and
patches are rows of a matrix (colour, row, column). The norm before the head is stored with the head in 2024.
"""

from __future__ import annotations

from typing import Any

from weightport.converters.operations import Reshape
from weightport.converters.patterns import Pattern
from weightport.converters.rules import Dropped, Rule, RuleTable, fused_qkv, permute, renames, table
from weightport.families.moondream2.revisions import Keys

TOWER, PROJECTOR, TEXT = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
VISION_LAYER, TEXT_LAYER = f"{TOWER}encoder.layers.*.", f"{TEXT}layers.*."
REGION = "region_head."


def _attention(source: str, target: str, sizes: tuple[int, int, int] | None = None) -> RuleTable:
    """One matrix and one bias of query, key and value."""
    return table(
        *(fused_qkv(f"{source}.{kind}", f"{target}{{part}}_proj.{kind}", sizes) for kind in ("weight", "bias"))
    )


def _patches(weight: str, positions: str, vision: Any) -> RuleTable:
    side, width = vision.patch_size, vision.hidden_size
    count = (vision.image_size // side) ** 2
    return table(
        Rule(
            (Pattern(weight),),
            (Pattern(f"{TOWER}embeddings.patch_embedding.weight"),),
            Reshape((width, 3 * side * side), (width, 3, side, side)),
        ),
        Rule(
            (Pattern(positions),),
            (Pattern(f"{TOWER}embeddings.position_embedding.weight"),),
            Reshape((1, count, width), (count, width)),
        ),
    )


def _of_2024(config: Any) -> RuleTable:
    visual = "vision_encoder.encoder.model.visual."
    return (
        renames(
            f"{visual}blocks.*.",
            VISION_LAYER,
            """
            norm{1,2}.{weight,bias}       layer_norm{1,2}.{weight,bias}
            attn.proj.{weight,bias}       self_attn.out_proj.{weight,bias}
            mlp.fc{1,2}.{weight,bias}
            """,
        )
        + _attention(f"{visual}blocks.*.attn.qkv", f"{VISION_LAYER}self_attn.")
        + _patches(f"{visual}patch_embed.linear.weight", f"{visual}pos_embed", config.vision_config)
        + renames(
            "",
            "",
            f"""
            {visual}patch_embed.linear.bias                     {TOWER}embeddings.patch_embedding.bias
            {visual}norm.{{weight,bias}}                        {TOWER}post_layernorm.{{weight,bias}}
            vision_encoder.projection.mlp.fc{{1,2}}.{{weight,bias}}  {PROJECTOR}linear_{{1,2}}.{{weight,bias}}
            text_model.transformer.embd.wte.weight              {TEXT}embed_tokens.weight
            text_model.lm_head.ln.{{weight,bias}}               {TEXT}final_layernorm.{{weight,bias}}
            text_model.lm_head.linear.{{weight,bias}}           lm_head.{{weight,bias}}
            """,
        )
        + renames(
            "text_model.transformer.h.*.",
            TEXT_LAYER,
            """
            ln.{weight,bias}              input_layernorm.{weight,bias}
            mixer.out_proj.{weight,bias}  self_attn.dense.{weight,bias}
            mlp.fc{1,2}.{weight,bias}
            """,
        )
        + _attention("text_model.transformer.h.*.mixer.Wqkv", f"{TEXT_LAYER}self_attn.")
        + table(
            Dropped(
                Pattern("text_model.transformer.h.*.mixer.rotary_emb.inv_freq"), "computed from rope_theta when needed"
            )
        )
    )


POINTS = renames(
    "region_model.",
    REGION,
    """
    {position,size}_features.weight                            {position,size}_features
    {position,size}_{encoder,decoder}.{weight,bias}
    confidence_decoder.{weight,bias}
    """,
)
"""The region head of 2024-08-26."""

COORDINATES = table(
    permute("region_model.coordinate_features.weight", f"{REGION}coord_features"),
    permute("region_model.size_features.weight", f"{REGION}size_features"),
    renames(
        "region_model.",
        REGION,
        """
        coordinate_encoder.{weight,bias}            coord_encoder.{weight,bias}
        coordinate_decoder.fc{1,2}.{weight,bias}    coord_decoder.fc{1,2}.{weight,bias}
        size_encoder.{weight,bias}
        size_decoder.fc{1,2}.{weight,bias}
        """,
    ),
)
"""The region head of late 2024, whose frequencies stand the other way round."""

BINS = renames(
    "region.",
    REGION,
    """
    {coord,size}_features
    {coord,size}_encoder.{weight,bias}
    {coord,size}_decoder.fc{1,2}.{weight,bias}
    """,
)
"""The region head of 2025."""


def _of_2025(config: Any) -> RuleTable:
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    rows = (text.hidden_size, text.num_key_value_heads * head, text.num_key_value_heads * head)
    return (
        renames(
            "vision.blocks.*.",
            VISION_LAYER,
            """
            ln{1,2}.{weight,bias}         layer_norm{1,2}.{weight,bias}
            attn.proj.{weight,bias}       self_attn.out_proj.{weight,bias}
            mlp.fc{1,2}.{weight,bias}
            """,
        )
        + _attention("vision.blocks.*.attn.qkv", f"{VISION_LAYER}self_attn.")
        + _patches("vision.patch_emb.weight", "vision.pos_emb", config.vision_config)
        + renames(
            "",
            "",
            f"""
            vision.patch_emb.bias                       {TOWER}embeddings.patch_embedding.bias
            vision.post_ln.{{weight,bias}}              {TOWER}post_layernorm.{{weight,bias}}
            vision.proj_mlp.fc{{1,2}}.{{weight,bias}}   {PROJECTOR}linear_{{1,2}}.{{weight,bias}}
            text.wte                                    {TEXT}embed_tokens.weight
            text.post_ln.{{weight,bias}}                {TEXT}final_layernorm.{{weight,bias}}
            text.lm_head.{{weight,bias}}                lm_head.{{weight,bias}}
            """,
        )
        + renames(
            "text.blocks.*.",
            TEXT_LAYER,
            """
            ln.{weight,bias}              input_layernorm.{weight,bias}
            attn.proj.{weight,bias}       self_attn.dense.{weight,bias}
            mlp.fc{1,2}.{weight,bias}
            """,
        )
        + _attention("text.blocks.*.attn.qkv", f"{TEXT_LAYER}self_attn.", rows)
        + table(Dropped(Pattern("text.blocks.*.kv_cache.{k,v}_cache"), "a cache of generation, saved with the model"))
    )


def moondream_rules(config: Any, keys: Keys) -> RuleTable:
    """The table of a model with the native configuration `config`, whose original has the names of `keys`."""
    if keys == "2025":
        return _of_2025(config) + BINS
    region = config.region_config
    if region is None:
        return _of_2024(config)
    return _of_2024(config) + (POINTS if region["kind"] == "points" else COORDINATES)
