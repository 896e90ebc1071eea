"""BLIP-2's names: LAVIS left, transformers right.

Checked against salesforce/LAVIS at 506965b9: models/blip2_models/{blip2,blip2_opt,blip2_t5,blip2_qformer,Qformer}.py,
models/eva_vit.py and models/clip_vit.py. The left side is the whole model's; a checkpoint holds what was trained of
it. The vision encoder's own file has its names without `visual_encoder.`, the language model's folder without
`opt_model.` or `t5_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from weightport.converters.operations import COPY, JoinAroundZeros, Resize, Rounded
from weightport.converters.patterns import Pattern
from weightport.converters.rules import Rule, RuleTable, derive, drop, fused_qkv, keep, renames, table, tie
from weightport.families.blip2.layouts import Kind, Tower

EVA_ATTENTION = "visual_encoder.blocks.*.attn."
NATIVE_LAYER = "vision_model.encoder.layers.*."

VISION = table(
    renames(
        "",
        "",
        """
        visual_encoder.cls_token                       vision_model.embeddings.class_embedding
        visual_encoder.patch_embed.proj.{weight,bias}  vision_model.embeddings.patch_embedding.{weight,bias}
        ln_vision.{weight,bias}                        vision_model.post_layernorm.{weight,bias}
        """,
    ),
    renames(
        "visual_encoder.blocks.*.",
        NATIVE_LAYER,
        """
        norm{1,2}.{weight,bias}         layer_norm{1,2}.{weight,bias}
        attn.qkv.weight                 self_attn.qkv.weight
        attn.proj.{weight,bias}         self_attn.projection.{weight,bias}
        mlp.fc{1,2}.{weight,bias}
        """,
    ),
    Rule(
        (Pattern(f"{EVA_ATTENTION}q_bias"), Pattern(f"{EVA_ATTENTION}v_bias")),
        (Pattern(f"{NATIVE_LAYER}self_attn.qkv.bias"),),
        JoinAroundZeros(),
    ),
    *(
        drop(f"visual_encoder.{name}.{{weight,bias}}", "the encoder's own classifier, which LAVIS does not build")
        for name in ("norm", "fc_norm", "head")
    ),
)

CLIP_VISION = table(
    renames(
        "",
        "",
        """
        visual_encoder.class_embedding        vision_model.embeddings.class_embedding
        visual_encoder.conv1.weight           vision_model.embeddings.patch_embedding.weight
        visual_encoder.ln_pre.{weight,bias}   vision_model.pre_layrnorm.{weight,bias}
        ln_vision.{weight,bias}               vision_model.post_layernorm.{weight,bias}
        """,
    ),
    renames(
        "visual_encoder.transformer.resblocks.*.",
        NATIVE_LAYER,
        """
        ln_{1,2}.{weight,bias}                layer_norm{1,2}.{weight,bias}
        attn.out_proj.{weight,bias}           self_attn.out_proj.{weight,bias}
        mlp.{c_fc,c_proj}.{weight,bias}       mlp.{fc1,fc2}.{weight,bias}
        """,
    ),
    fused_qkv(
        "visual_encoder.transformer.resblocks.*.attn.in_proj_{weight,bias}",
        into=NATIVE_LAYER + "self_attn.{part}_proj.{weight,bias}",
    ),
    drop("visual_encoder.ln_post.{weight,bias}", "CLIP's own last norm, which LAVIS does not build"),
    drop("visual_encoder.proj", "CLIP's projection to texts, which LAVIS does not build"),
)

QUERIES = table(
    renames(
        "",
        "",
        """
        query_tokens
        Qformer.bert.embeddings.LayerNorm.{weight,bias}  qformer.layernorm.{weight,bias}
        """,
    ),
    renames(
        "Qformer.bert.encoder.layer.*.",
        "qformer.encoder.layer.*.",
        """
        {attention,crossattention}.self.{query,key,value}.{weight,bias}   {attention,crossattention}.attention.{query,key,value}.{weight,bias}
        {attention,crossattention}.output.{dense,LayerNorm}.{weight,bias}
        intermediate_query.dense.{weight,bias}
        output_query.{dense,LayerNorm}.{weight,bias}
        """,  # noqa: E501 - a row is a line
    ),
    derive(
        "Qformer.bert.embeddings.position_ids",
        lambda config, name: torch.arange(config.qformer_config.max_position_embeddings)[None],
        "position numbers, counted anew",
        optional=True,
    ),
)

MATCHING = table(
    tie(
        "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.cls.predictions.decoder.weight",
        to="embeddings.word_embeddings.weight",
    ),
    renames(
        "",
        "",
        """
        Qformer.bert.embeddings.position_embeddings.weight  embeddings.position_embeddings.weight
        vision_proj.{weight,bias}                           vision_projection.{weight,bias}
        text_proj.{weight,bias}                             text_projection.{weight,bias}
        itm_head.{weight,bias}
        """,
    ),
    renames(
        "Qformer.bert.encoder.layer.*.",
        "qformer.encoder.layer.*.",
        """
        intermediate.dense.{weight,bias}
        output.{dense,LayerNorm}.{weight,bias}
        """,
    ),
    keep("temp", "the contrastive loss's temperature, which the native model has no place for"),
    keep(
        "Qformer.cls.predictions.{decoder.bias,bias}", "the captioning head, which the native model has no place for"
    ),
    keep(
        "Qformer.cls.predictions.transform.{dense,LayerNorm}.{weight,bias}",
        "the captioning head, which the native model has no place for",
    ),
)


OPT = table(
    renames("opt_proj.", "language_projection.", "{weight,bias}"),
    renames(
        "opt_model.model.decoder.",
        "language_model.model.decoder.",
        """
        embed_positions.weight
        final_layer_norm.{weight,bias}
        project_{in,out}.weight
        layers.*.self_attn.{q,k,v,out}_proj.{weight,bias}
        layers.*.{self_attn,final}_layer_norm.{weight,bias}
        layers.*.fc{1,2}.{weight,bias}
        """,
    ),
    tie(
        "opt_model.model.decoder.embed_tokens.weight",
        "opt_model.lm_head.weight",
        to="language_model.model.decoder.embed_tokens.weight",
    ),
    drop("opt_model.model.decoder.version", "the number of a file format, in early OPT files"),
)

T5 = table(
    renames("t5_proj.", "language_projection.", "{weight,bias}"),
    renames(
        "t5_model.",
        "language_model.",
        """
        lm_head.weight
        {encoder,decoder}.final_layer_norm.weight
        {encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o,relative_attention_bias}.weight
        {encoder,decoder}.block.*.layer.*.layer_norm.weight
        {encoder,decoder}.block.*.layer.*.DenseReluDense.{wi,wi_0,wi_1,wo}.weight
        decoder.block.*.layer.1.EncDecAttention.{q,k,v,o}.weight
        """,
    ),
    tie(
        "t5_model.shared.weight",
        "t5_model.encoder.embed_tokens.weight",
        "t5_model.decoder.embed_tokens.weight",
        to="language_model.shared.weight",
    ),
    drop(
        "t5_model.decoder.block.*.layer.1.EncDecAttention.relative_attention_bias.weight",
        "of early T5 files, and used by no T5",
    ),
)

LANGUAGE = {"opt": OPT, "t5": T5}


@dataclass(frozen=True)
class PositionTable:
    """The vision encoder's position table: the side of its grid in the source and in the model."""

    source: int
    target: int

    def rule(self, tower: Tower) -> Rule:
        """How LAVIS resizes it: EVA's in float32, and left in float32; CLIP's in its own dtype, corner on corner."""
        source, target = POSITIONS[tower]
        same = self.source == self.target
        if tower == "eva":
            resize = Resize(self.source, self.target, extra=1, precision="float32")
        else:
            resize = Resize(self.source, self.target, extra=1, align_corners=True, precision="own")
        return Rule((Pattern(source),), (Pattern(target),), COPY if same else resize)


POSITIONS: Mapping[Tower, tuple[str, str]] = {
    "eva": ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    "clip": ("visual_encoder.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
}


def blip2_rules(
    kind: Kind, tower: Tower, positions: PositionTable | None = None, *, rounded: bool = False
) -> RuleTable:
    """The table of a model of `kind` with the vision encoder `tower`. `rounded`: the language model as LAVIS rounds
    it."""
    vision = VISION if tower == "eva" else CLIP_VISION
    rest = MATCHING if kind == "itm" else LANGUAGE[kind]
    table_of_positions = (positions or PositionTable(0, 0)).rule(tower)
    return table(table_of_positions, vision, QUERIES, _rounded(rest) if rounded else rest)


def _rounded(language: RuleTable) -> RuleTable:
    """`language` with the language model's tensors rounded to bfloat16."""
    return replace(
        language,
        rules=tuple(
            replace(rule, operation=Rounded(torch.bfloat16)) if "_model." in rule.sources[0].text else rule
            for rule in language.rules
        ),
    )
