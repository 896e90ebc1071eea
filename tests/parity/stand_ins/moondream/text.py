"""A text model with a key-value cache that is written in place, and an attention mask over a prefix."""

import torch
from torch.nn import functional as F

from .layers import layer_norm


def text_encoder(ids, w):
    return F.embedding(ids, w.wte)


def text_decoder(x, w, attn_mask, position_ids, config, lora=None):
    for block in w["blocks"]:
        y = block["qkv"](layer_norm(x, block["ln"]))
        if block.kv_cache is not None:
            block.kv_cache.k_cache[:, position_ids] = y
            y = block.kv_cache.k_cache
        scores = (x @ y.transpose(1, 2)).masked_fill(~attn_mask[0, :, : y.shape[1]], float("-inf"))
        x = x + torch.softmax(scores, dim=-1) @ y
    return x


def lm_head(hidden, w):
    return w["lm_head"](layer_norm(hidden[:, -1], w["post_ln"]))
