"""PaliGemma: big_vision's names on the left, the Hub's repositories' on the right.

Source of the left side: google-research/big_vision at 0127fb6, models/vit.py and models/ppp/gemma.py. The right side
is what files hold, and what serving engines read; transformers' running model calls some of it otherwise.

Nothing is dropped, nothing is permuted for rotary positions (both sides rotate halves), and image features are not
scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightport.converters.operations import COPY, Chain, Operation, Pad, Permute, Reshape, Unstack
from weightport.converters.patterns import Pattern
from weightport.converters.rules import Rule, RuleTable, permute, renames, table, unstack
from weightport.families.paligemma2.layouts import Towers

TRANSPOSE = Permute((1, 0))
# [heads, width, head width] → [heads, head width, width]
HEADS_FIRST = Permute((0, 2, 1))

VISION, TEXT, PROJECTOR = "vision_tower.vision_model.", "language_model.model.", "multi_modal_projector.linear."
VISION_LAYER, TEXT_LAYER = f"{VISION}encoder.layers.*.", f"{TEXT}layers.*."

MEMORY = {
    VISION: "model.vision_tower.",
    TEXT: "model.language_model.",
    PROJECTOR: f"model.{PROJECTOR}",
    # Only of a head that is not tied, as adapters may leave it.
    "language_model.lm_head.": "lm_head.",
}
"""What stands before names on disk, and what transformers' running model has in its place."""

LayerRow = tuple[str, Sequence[str], Operation]
"""(name in a layer of the original, names in a layer of the native model, what happens to one layer's tensor)."""


def name_on_disk(name: str) -> str:
    """What the Hub's files call the running model's tensor `name`."""
    disk, memory = next((disk, memory) for disk, memory in MEMORY.items() if name.startswith(memory))
    return disk + name.removeprefix(memory)


def vision_layer(width: int, heads: int) -> tuple[LayerRow, ...]:
    """One block of the SigLIP tower."""
    attention, each = "MultiHeadDotProductAttention_0/", width // heads
    joined = Reshape((width, heads, each), (width, width))
    return (
        ("LayerNorm_{0,1}/{scale,bias}", ["layer_norm{1,2}.{weight,bias}"], COPY),
        ("MlpBlock_0/Dense_{0,1}/kernel", ["mlp.fc{1,2}.weight"], TRANSPOSE),
        ("MlpBlock_0/Dense_{0,1}/bias", ["mlp.fc{1,2}.bias"], COPY),
        (attention + "{query,key,value}/kernel", ["self_attn.{q,k,v}_proj.weight"], Chain((joined, TRANSPOSE))),
        (attention + "{query,key,value}/bias", ["self_attn.{q,k,v}_proj.bias"], Reshape((heads, each), (width,))),
        (
            attention + "out/kernel",
            ["self_attn.out_proj.weight"],
            Chain((Reshape((heads, each, width), (width, width)), TRANSPOSE)),
        ),
        (attention + "out/bias", ["self_attn.out_proj.bias"], COPY),
    )


def text_layer(text: Any) -> tuple[LayerRow, ...]:
    """One block of Gemma. The norm before the feed-forward part has the name in Gemma 1 that the norm behind attention
    has in Gemma 2."""
    width, each = text.hidden_size, text.head_dim
    query, key = text.num_attention_heads, text.num_key_value_heads
    norms = _GEMMA_1_NORMS if text.model_type == "gemma" else _GEMMA_2_NORMS

    def heads(count: int) -> Operation:
        return Chain((HEADS_FIRST, Reshape((count, each, width), (count * each, width))))

    return (
        ("attn/q_einsum/w", ["self_attn.q_proj.weight"], heads(query)),
        (
            "attn/kv_einsum/w",
            ["self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            Chain((Unstack(parts=2), heads(key))),
        ),
        (
            "attn/attn_vec_einsum/w",
            ["self_attn.o_proj.weight"],
            Chain((Reshape((query, each, width), (query * each, width)), TRANSPOSE)),
        ),
        ("mlp/gating_einsum", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], Chain((Unstack(parts=2), TRANSPOSE))),
        ("mlp/linear", ["mlp.down_proj.weight"], TRANSPOSE),
        *((f"{original}/scale", [f"{native}.weight"], COPY) for original, native in norms.items()),
    )


_GEMMA_1_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "pre_ffw_norm": "post_attention_layernorm",
}
_GEMMA_2_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

AROUND = table(
    renames(
        "",
        "",
        f"""
        img/embedding/bias                          {VISION}embeddings.patch_embedding.bias
        img/Transformer/encoder_norm/{{scale,bias}}   {VISION}post_layernorm.{{weight,bias}}
        img/head/bias                               {PROJECTOR}bias
        llm/final_norm/scale                        {TEXT}norm.weight
        """,
    ),
    permute("img/embedding/kernel", f"{VISION}embeddings.patch_embedding.weight", (3, 2, 0, 1)),
    permute("img/head/kernel", f"{PROJECTOR}weight"),
)

EMBEDDING = "llm/embedder/input_embedding"


def paligemma_rules(config: Any, towers: Towers) -> RuleTable:
    """The table of a model with the native configuration `config`, whose original is laid out as `towers` says."""
    vision, text = config.vision_config, config.text_config
    positions = (vision.image_size // vision.patch_size) ** 2
    # The original has no row for <image>, whose id is the first one outside its table.
    appended = text.vocab_size - config.image_token_index
    vision_source = "img/Transformer/encoderblock" + ("/" if towers.vision_stacked else "_*/")
    text_source = "llm/layers/" + ("" if towers.text_stacked else "*/")
    return AROUND + table(
        Rule((Pattern(EMBEDDING),), (Pattern(f"{TEXT}embed_tokens.weight"),), Pad(appended) if appended else COPY),
        Rule(
            (Pattern("img/pos_embedding"),),
            (Pattern(f"{VISION}embeddings.position_embedding.weight"),),
            Reshape((1, positions, vision.hidden_size), (positions, vision.hidden_size)),
        ),
        *_layers(
            vision_source,
            VISION_LAYER,
            vision_layer(vision.hidden_size, vision.num_attention_heads),
            towers.vision_stacked,
        ),
        *_layers(text_source, TEXT_LAYER, text_layer(text), towers.text_stacked),
    )


def _layers(source: str, target: str, rows: Sequence[LayerRow], stacked: bool) -> list[Rule]:
    """The rules of a tower's layers: one tensor of all layers, or one a layer, by the same rows."""
    rules = []
    for original, native, operation in rows:
        names = [target + name for name in native]
        if stacked:
            rules.append(unstack(source + original, *names, each=operation))
        else:
            rules.append(Rule((Pattern(source + original),), tuple(map(Pattern, names)), operation))
    return rules
