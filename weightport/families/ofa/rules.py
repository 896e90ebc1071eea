"""OFA: fairseq's names on the left, the native model's on the right.

Source of the left side: OFA-Sys/OFA commit a36b91ce, models/ofa (unify_transformer, unify_transformer_layer,
unify_multihead_attention, resnet, vit).
"""

from __future__ import annotations

from typing import Any

from weightport.converters.rules import RuleTable, derive, drop, move, renames, split, table, tie
from weightport.families.ofa.buffers import image_bucket, image_position_index, token_bucket, version

TIED_EMBEDDINGS = table(
    tie(
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.output_projection.weight",
        to="model.encoder.embed_tokens.weight",
    ),
)
TIED_DECODER_EMBEDDINGS = table(
    move("encoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"),
    tie("decoder.embed_tokens.weight", "decoder.output_projection.weight", to="model.decoder.embed_tokens.weight"),
)
SEPARATE_EMBEDDINGS = table(
    move("{encoder,decoder}.embed_tokens.weight", "model.{encoder,decoder}.embed_tokens.weight"),
    move("decoder.output_projection.weight", "lm_head.weight"),
)

EMBEDDINGS = renames(
    "",
    "model.",
    """
    {encoder,decoder}.layernorm_embedding.{weight,bias}
    encoder.type_embedding.weight
    encoder.image_proj.{weight,bias}
    encoder.patch_layernorm_embedding.{weight,bias}
    decoder.code_layernorm_embedding.{weight,bias}
    """,
)

POSITIONS = renames(
    "",
    "model.",
    """
    {encoder,decoder}.embed_positions.weight
    {encoder,decoder}.embed_image_positions.weight
    {encoder,decoder}.{pos_ln,image_pos_ln}.{weight,bias}
    encoder.pos_{q,k}_linear.{weight,bias}
    decoder.{self,cross}_pos_{q,k}_linear.{weight,bias}
    {encoder,decoder}.{token,image}_rel_pos_table_list.*.weight {encoder,decoder}.{token,image}_rel_pos_tables.*.weight
    """,
)

ENCODER_LAYERS = renames(
    "encoder.layers.*.",
    "model.encoder.layers.*.",
    """
    self_attn.{q,k,v,out}_proj.{weight,bias}
    self_attn.c_attn
    self_attn_layer_norm.{weight,bias}
    attn_ln.{weight,bias}                       self_attn_output_norm.{weight,bias}
    """,
)

DECODER_LAYERS = renames(
    "decoder.layers.*.",
    "model.decoder.layers.*.",
    """
    self_attn.{q,k,v,out}_proj.{weight,bias}
    self_attn.c_attn
    self_attn_layer_norm.{weight,bias}
    self_attn_ln.{weight,bias}                  self_attn_output_norm.{weight,bias}
    encoder_attn.{q,k,v,out}_proj.{weight,bias} cross_attn.{q,k,v,out}_proj.{weight,bias}
    encoder_attn.c_attn                         cross_attn.c_attn
    encoder_attn_layer_norm.{weight,bias}       cross_attn_layer_norm.{weight,bias}
    cross_attn_ln.{weight,bias}                 cross_attn_output_norm.{weight,bias}
    """,
)

FEED_FORWARD = renames(
    "{encoder,decoder}.",
    "model.{encoder,decoder}.",
    """
    layers.*.fc{1,2}.{weight,bias}
    layers.*.ffn_layernorm.{weight,bias}        layers.*.ffn_layer_norm.{weight,bias}
    layers.*.final_layer_norm.{weight,bias}
    layers.*.w_resid
    layers.*.adapter.{down,up}_proj.{weight,bias}
    layer_norm.{weight,bias}
    """,
)

_TOWER = "model.encoder.vision_tower."

# torchvision's names for the ResNet v1.5 that ends after its third stage → transformers' ResNetModel.
RESNET = renames(
    "encoder.embed_images.",
    _TOWER,
    """
    conv1.weight                                 embedder.embedder.convolution.weight
    layer{1,2,3}.*.conv{1,2,3}.weight            encoder.stages.{0,1,2}.layers.*.layer.{0,1,2}.convolution.weight
    layer{1,2,3}.*.downsample.0.weight           encoder.stages.{0,1,2}.layers.*.shortcut.convolution.weight
    """,
)


def _batch_norms(parts: str) -> RuleTable:
    return renames(
        "encoder.embed_images.",
        _TOWER,
        f"""
        bn1.{parts}                         embedder.embedder.normalization.{parts}
        layer{{1,2,3}}.*.bn{{1,2,3}}.{parts}    encoder.stages.{{0,1,2}}.layers.*.layer.{{0,1,2}}.normalization.{parts}
        layer{{1,2,3}}.*.downsample.1.{parts} encoder.stages.{{0,1,2}}.layers.*.shortcut.normalization.{parts}
        """,
    )


FROZEN_BATCH_NORMS = _batch_norms("{weight,bias,running_mean,running_var}")
BATCH_NORMS = _batch_norms("{weight,bias,running_mean,running_var,num_batches_tracked}")

# CLIP's names for the vision transformer → ours; CLIP keeps query, key and value in one matrix.
VIT = table(
    renames(
        "encoder.embed_images.",
        _TOWER,
        """
        conv1.weight                                                  patch_embedding.weight
        positional_embedding                                          position_embedding.weight
        ln_pre.{weight,bias}                                          pre_layer_norm.{weight,bias}
        transformer.resblocks.*.attn.out_proj.{weight,bias}           layers.*.self_attn.out_proj.{weight,bias}
        transformer.resblocks.*.ln_{1,2}.{weight,bias}                layers.*.layer_norm{1,2}.{weight,bias}
        transformer.resblocks.*.mlp.{c_fc,c_proj}.{weight,bias}       layers.*.{fc1,fc2}.{weight,bias}
        """,
    ),
    split(
        "encoder.embed_images.transformer.resblocks.*.attn.in_proj_{weight,bias}",
        into=tuple(f"{_TOWER}layers.*.self_attn.{part}_proj.{{weight,bias}}" for part in "qkv"),
    ),
)

BUFFERS = table(
    derive("{encoder,decoder}.version", version, because="fairseq's format version, a constant"),
    derive("{encoder,decoder}.token_rp_bucket", token_bucket, because="recomputed from token_bucket_size"),
    derive("{encoder,decoder}.image_rp_bucket", image_bucket, because="recomputed from image_bucket_size"),
    derive(
        "decoder.image_position_idx",
        image_position_index,
        because="recomputed from code_image_size and image_bucket_size",
    ),
)

BODY = EMBEDDINGS + POSITIONS + ENCODER_LAYERS + DECODER_LAYERS + FEED_FORWARD

# Names of the OFA-Sys Hub repositories and of YeungNLP's ofa-cn-* → fairseq's; every other name is the same in both.
PORT_TO_FAIRSEQ = renames(
    "",
    "",
    """
    encoder.layers.*.self_attn_mid_layer_norm.{weight,bias}   encoder.layers.*.attn_ln.{weight,bias}
    decoder.layers.*.self_attn_mid_layer_norm.{weight,bias}   decoder.layers.*.self_attn_ln.{weight,bias}
    decoder.layers.*.cross_attn_mid_layer_norm.{weight,bias}  decoder.layers.*.cross_attn_ln.{weight,bias}
    decoder.layers.*.cross_attn_layer_norm.{weight,bias}      decoder.layers.*.encoder_attn_layer_norm.{weight,bias}
    decoder.layers.*.cross_attn.**                            decoder.layers.*.encoder_attn.**
    {encoder,decoder}.layers.*.ffn_layer_norm.{weight,bias}   {encoder,decoder}.layers.*.ffn_layernorm.{weight,bias}
    """,
)


def embedding_rules(*, shared: bool, tied: bool) -> RuleTable:
    """`shared`: encoder, decoder and output projection are one table. `tied`: the latter two are."""
    return TIED_EMBEDDINGS if shared else TIED_DECODER_EMBEDDINGS if tied else SEPARATE_EMBEDDINGS


def fairseq_rules(config: Any) -> RuleTable:
    """The table of a fairseq checkpoint whose native configuration is `config` (an OFAConfig)."""
    return _rules(config) + BUFFERS


def port_rules(config: Any) -> RuleTable:
    """The table of an existing port's directory, after PORT_TO_FAIRSEQ: its index buffers are dropped unread."""
    because = "recomputed from the configuration"
    return _rules(config) + table(
        drop("{encoder,decoder}.{version,token_rp_bucket,image_rp_bucket}", because=because),
        drop("decoder.image_position_idx", because=because),
    )


def _rules(config: Any) -> RuleTable:
    embeddings = embedding_rules(shared=config.share_all_embeddings, tied=config.tie_word_embeddings)
    if config.vision_config.model_type != "resnet":
        return embeddings + BODY + VIT
    # A frozen batch norm counts no batches, neither in the original nor here.
    return embeddings + BODY + RESNET + (FROZEN_BATCH_NORMS if config.freeze_batch_norm else BATCH_NORMS)
