"""Layers of OFA: attention that adds a position bias to its scores, and the NormFormer encoder and decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_ofa import OFAConfig

# Score of a masked pair. No softmax gives it weight beside an unmasked one, and it stays finite in float16 however
# many biases are added to it, so that a fully masked row averages its values where -inf would make it NaN.
MASKED_SCORE = -3e4

# fairseq's names that transformers has for something else, or does not have.
FAIRSEQ_ACTIVATIONS = {"gelu_fast": "gelu_new", "gelu_accurate": "gelu_new", "relu_squared": "relu2"}


def activation(name: str) -> nn.Module:
    """The activation function of this name, fairseq's or transformers'."""
    return ACT2FN[FAIRSEQ_ACTIVATIONS.get(name, name)]


def mask_position_bias(position_bias: torch.Tensor, mask: Any) -> torch.Tensor:
    """Position bias [batch or 1, heads, queries, keys] with a mask in it, as one additive attention mask.

    `mask` is what transformers' mask functions return for the attention in use: `None`, bool (True attends), or
    additive of a floating dtype.
    """
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, MASKED_SCORE)
    return (position_bias + mask).clamp(min=MASKED_SCORE).to(position_bias.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention; softmax in float32, or in float64 for a float64 model, as the original computes it."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def fold_beams(states: torch.Tensor, beams: int) -> torch.Tensor:
    """States [samples * beams, heads, queries, n], the beams of a sample side by side, as more queries of the sample:
    [samples, heads, beams * queries, n]."""
    if beams == 1:
        return states
    return states.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


class OFADropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch of a whole sample with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        keep = hidden_states.new_empty(shape).bernoulli_(1 - self.rate)
        return hidden_states * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class OFAAttention(nn.Module):
    """Multi-head attention of queries scaled for an added position term, with an optional learned scale per head."""

    def __init__(self, config: OFAConfig, num_heads: int, is_causal: bool = False, layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = config.d_model // num_heads
        self.scaling = (self.head_dim * config.attn_scale_factor) ** -0.5
        self.dropout = config.attention_dropout
        self.is_causal = is_causal
        self.layer_idx = layer_idx

        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.c_attn = nn.Parameter(torch.ones(num_heads)) if config.scale_heads else None

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`attention_mask` is additive, [batch or 1, heads, queries, keys]: the position bias with the mask in it.

        Keys and values come from `key_value_states` (cross-attention) if given. They may have fewer samples than the
        queries, each for as many consecutive ones (the beams of a sample): the mask is then as `fold_beams` gives it.
        Returns the output [batch, queries, d_model] and the attention weights, `None` unless the attention is eager.
        """
        is_cross_attention = key_value_states is not None
        cache: Any = past_key_values
        is_filled = False
        if isinstance(past_key_values, EncoderDecoderCache):
            is_filled = is_cross_attention and bool(past_key_values.is_updated.get(self.layer_idx))
            cache = (
                past_key_values.cross_attention_cache if is_cross_attention else past_key_values.self_attention_cache
            )

        query = self._split_heads(self.q_proj(hidden_states))
        if is_filled:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            states = key_value_states if is_cross_attention else hidden_states
            key, value = self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if is_cross_attention and isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values.is_updated[self.layer_idx] = True

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        beams = query.shape[0] // key.shape[0]
        output, weights = attention_interface(
            self,
            fold_beams(query, beams),
            key,
            value,
            attention_mask.to(query.dtype),
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if self.c_attn is not None:
            output = output * self.c_attn[:, None]
        if weights is not None and beams > 1:
            weights = weights.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class OFAAdapter(nn.Module):
    """Bottleneck adapter of adapter tuning: a ReLU between two small projections, around which the input is added."""

    def __init__(self, config: OFAConfig, adapter_dim: int):
        super().__init__()
        self.down_proj = nn.Linear(config.d_model, adapter_dim)
        self.up_proj = nn.Linear(adapter_dim, config.d_model)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.up_proj(nn.functional.relu(self.down_proj(hidden_states)))


class OFALayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: norms before or after each sub-layer, NormFormer's extra ones, FFN."""

    def __init__(self, config: OFAConfig, ffn_dim: int, normalize_before: bool, drop_path_rate: float):
        super().__init__()
        self.normalize_before = normalize_before
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.activation_fn = activation(config.activation_function)
        self.drop_path = OFADropPath(drop_path_rate)
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.ffn_layer_norm = nn.LayerNorm(ffn_dim) if config.scale_fc else None
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.adapter = OFAAdapter(config, config.adapter_dim) if config.adapter_dim else None
        self.w_resid = nn.Parameter(torch.ones(config.d_model)) if config.scale_resids else None
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(branch, p=self.dropout, training=self.training)

    def _attend(
        self,
        attention: OFAAttention,
        norm: nn.LayerNorm,
        output_norm: nn.LayerNorm | None,
        hidden_states: torch.Tensor,
        **kwargs,
    ) -> torch.Tensor:
        branch = norm(hidden_states) if self.normalize_before else hidden_states
        branch, _ = attention(branch, **kwargs)
        if output_norm is not None:
            branch = output_norm(branch)
        hidden_states = hidden_states + self.drop_path(self._drop(branch))
        return hidden_states if self.normalize_before else norm(hidden_states)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = self.final_layer_norm(hidden_states) if self.normalize_before else hidden_states
        branch = self.activation_fn(self.fc1(branch))
        branch = nn.functional.dropout(branch, p=self.activation_dropout, training=self.training)
        if self.ffn_layer_norm is not None:
            branch = self.ffn_layer_norm(branch)
        branch = self._drop(self.fc2(branch))
        if self.adapter is not None:
            branch = self.adapter(branch)
        residual = hidden_states if self.w_resid is None else self.w_resid * hidden_states
        hidden_states = residual + self.drop_path(branch)
        return hidden_states if self.normalize_before else self.final_layer_norm(hidden_states)


class OFAEncoderLayer(OFALayer):
    """Self-attention over patches and text, then a feed-forward layer."""

    def __init__(self, config: OFAConfig, drop_path_rate: float = 0.0, layer_idx: int = 0):
        super().__init__(config, config.encoder_ffn_dim, config.encoder_normalize_before, drop_path_rate)
        self.self_attn = OFAAttention(config, config.encoder_attention_heads, layer_idx=layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn_output_norm = nn.LayerNorm(config.d_model) if config.scale_attn else None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        hidden_states = self._attend(
            self.self_attn,
            self.self_attn_layer_norm,
            self.self_attn_output_norm,
            hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )
        return self._feed_forward(hidden_states)


class OFADecoderLayer(OFALayer):
    """Causal self-attention, attention to the encoder's output, then a feed-forward layer."""

    def __init__(self, config: OFAConfig, drop_path_rate: float = 0.0, layer_idx: int = 0):
        super().__init__(config, config.decoder_ffn_dim, config.decoder_normalize_before, drop_path_rate)
        heads = config.decoder_attention_heads
        self.self_attn = OFAAttention(config, heads, is_causal=True, layer_idx=layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn_output_norm = nn.LayerNorm(config.d_model) if config.scale_attn else None
        self.cross_attn = OFAAttention(config, heads, layer_idx=layer_idx)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attn_output_norm = nn.LayerNorm(config.d_model) if config.scale_attn else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self._attend(
            self.self_attn,
            self.self_attn_layer_norm,
            self.self_attn_output_norm,
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self._attend(
            self.cross_attn,
            self.cross_attn_layer_norm,
            self.cross_attn_output_norm,
            hidden_states,
            attention_mask=encoder_attention_mask,
            key_value_states=encoder_hidden_states,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self._feed_forward(hidden_states)
