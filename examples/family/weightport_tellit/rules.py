"""Tellit: the original's names on the left, transformers' GIT on the right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightport.converters.operations import Reshape, Unstack
from weightport.converters.patterns import Pattern
from weightport.converters.rules import Rule, RuleTable, fused_qkv, renames, split, table, unstack

if TYPE_CHECKING:
    from transformers import GitConfig

_VISION = "git.image_encoder.vision_model."
_LAYER = "git.encoder.layer.*."

IMAGE = table(
    renames(
        "image.",
        _VISION,
        """
        patches.weight                              embeddings.patch_embedding.weight
        cls                                         embeddings.class_embedding
        norm_in.{weight,bias}                       pre_layrnorm.{weight,bias}
        norm_out.{weight,bias}                      post_layernorm.{weight,bias}
        blocks.*.norm{1,2}.{weight,bias}            encoder.layers.*.layer_norm{1,2}.{weight,bias}
        blocks.*.attn.out.{weight,bias}             encoder.layers.*.self_attn.out_proj.{weight,bias}
        blocks.*.{up,down}.{weight,bias}            encoder.layers.*.mlp.{fc1,fc2}.{weight,bias}
        """,
    ),
    fused_qkv(
        "image.blocks.*.attn.qkv.{weight,bias}", into=_VISION + "encoder.layers.*.self_attn.{part}_proj.{weight,bias}"
    ),
)

TEXT = table(
    renames(
        "",
        "git.",
        """
        bridge.{weight,bias}                        visual_projection.visual_projection.0.{weight,bias}
        bridge_norm.{weight,bias}                   visual_projection.visual_projection.1.{weight,bias}
        text.{tokens,positions}.weight              embeddings.{word_embeddings,position_embeddings}.weight
        text.norm.{weight,bias}                     embeddings.LayerNorm.{weight,bias}
        text.blocks.*.attn.out.{weight,bias}        encoder.layer.*.attention.output.dense.{weight,bias}
        text.blocks.*.up.{weight,bias}              encoder.layer.*.intermediate.dense.{weight,bias}
        text.blocks.*.down.{weight,bias}            encoder.layer.*.output.dense.{weight,bias}
        """,
    ),
    renames("", "", "head.{weight,bias}  output.{weight,bias}"),
    split(
        "text.blocks.*.attn.qkv.{weight,bias}",
        into=tuple(f"{_LAYER}attention.self.{part}.{{weight,bias}}" for part in ("query", "key", "value")),
    ),
    # [layers, 2, width]: scale and shift of every layer's norm in one tensor.
    unstack(
        "text.attn_norms",
        f"{_LAYER}attention.output.LayerNorm.weight",
        f"{_LAYER}attention.output.LayerNorm.bias",
        each=Unstack(parts=2),
    ),
    unstack(
        "text.mlp_norms", f"{_LAYER}output.LayerNorm.weight", f"{_LAYER}output.LayerNorm.bias", each=Unstack(parts=2)
    ),
)


def tellit_rules(config: GitConfig) -> RuleTable:
    """The table of a model of this configuration: the original's positions have a batch axis of 1."""
    vision = config.vision_config
    rows, width = (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size
    positions = Rule(
        (Pattern("image.pos"),),
        (Pattern(f"{_VISION}embeddings.position_embedding.weight"),),
        Reshape((1, rows, width), (rows, width)),
    )
    return IMAGE + TEXT + table(positions)
