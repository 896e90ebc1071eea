"""OFA (One For All) and OFA-CN for transformers 5: one encoder for patches and text, one decoder for text and codes.

The port of OFA-Sys/OFA's fairseq model. Where it departs from BART: positions are a bias of the attention scores
(absolute ones projected and multiplied, relative ones looked up per layer), attention and feed-forward layers carry
NormFormer's extra norms and scales, and the encoder hands on the position embeddings that cross-attention needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    ModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_ofa import OFAConfig
from .generation_ofa import OFAGenerationMixin
from .layers_ofa import OFAAttention, OFADecoderLayer, OFAEncoderLayer, OFALayer, mask_position_bias
from .loss_ofa import ofa_label_smoothed_loss
from .positions_ofa import (
    BEYOND_CODE_WINDOW,
    CODE_STRIDE,
    MAX_TEXT_POSITIONS,
    code_position_ids,
    image_relative_buckets,
    patch_position_ids,
    text_relative_buckets,
)
from .vision_ofa import batch_norms, build_vision_tower, vision_channels

logger = logging.get_logger(__name__)

# Pixels along a side of the square that one image position stands for, in every tower OFA has.
PATCH_STRIDE = 16


@dataclass
class OFAEncoderOutput(ModelOutput):
    r"""What the decoder needs of the encoder. The source is the image's patches, row by row, then the text.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, source_length, d_model)`): encoded source.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, source_length)`): False where it is masked.
        position_embeddings (`torch.FloatTensor` of shape `(batch_size, source_length, d_model)`): normed absolute
            position embeddings of the source.
        hidden_states, attentions (`tuple` of tensors): of every layer, on request.
        position_keys (`torch.FloatTensor` of shape `(batch_size, heads, source_length, head_dim)`): the decoder's
            projection of `position_embeddings`, which generation computes once and keeps here.
    """

    last_hidden_state: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    position_keys: torch.Tensor | None = None


def shift_tokens_right(labels: torch.Tensor, pad_token_id: Any, decoder_start_token_id: Any) -> torch.Tensor:
    """Decoder inputs for these labels, int64 [batch, length]: the start token, then all labels but the last."""
    shifted = torch.cat([torch.full_like(labels[:, :1], decoder_start_token_id), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


class OFAScaledWordEmbedding(nn.Embedding):
    """Token embedding multiplied by a constant (`sqrt(d_model)` with `config.scale_embedding`)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class OFAPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the library has to know about every OFA model."""

    config_class = OFAConfig
    config: OFAConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["OFAEncoderLayer", "OFADecoderLayer", "ResNetConvLayer", "OFAVisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # The position bias of the scores is no argument of these kernels.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True
    # Frozen batch norms count no batches; files of the other kind do.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\..*\.num_batches_tracked$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, OFAAttention) and module.c_attn is not None:
            init.ones_(module.c_attn)
        elif isinstance(module, OFALayer) and module.w_resid is not None:
            init.ones_(module.w_resid)
        elif isinstance(module, OFAStack):
            init.copy_(module.text_buckets, text_relative_buckets(self.config.token_bucket_size))
            for table in (*module.token_rel_pos_tables, *module.image_rel_pos_tables):
                init.zeros_(table.weight)


class OFAStack(OFAPreTrainedModel):
    """What encoder and decoder share: embeddings, position tables, and the biases made of them."""

    text_buckets: torch.Tensor

    def __init__(self, config: OFAConfig, num_layers: int, num_heads: int, max_positions: int):
        super().__init__(config)
        self.num_heads = num_heads
        self.dropout = config.dropout
        # Content and position scores are added: both are scaled for a head `attn_scale_factor` times as wide.
        self.position_scaling = (config.d_model / num_heads * config.attn_scale_factor) ** -0.5

        embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = OFAScaledWordEmbedding(config.vocab_size, config.d_model, config.pad_token_id, embed_scale)
        self.layernorm_embedding = nn.LayerNorm(config.d_model) if config.layernorm_embedding else None
        self.embed_positions = nn.Embedding(max_positions + 2, config.d_model)
        self.embed_image_positions = nn.Embedding(config.image_bucket_size**2 + 1, config.d_model)
        self.pos_ln = nn.LayerNorm(config.d_model)
        self.image_pos_ln = nn.LayerNorm(config.d_model)
        token_rows, image_rows = 2 * config.token_bucket_size - 1, (2 * config.image_bucket_size - 1) ** 2 + 3
        self.token_rel_pos_tables = nn.ModuleList(nn.Embedding(token_rows, num_heads) for _ in range(num_layers))
        self.image_rel_pos_tables = nn.ModuleList(nn.Embedding(image_rows, num_heads) for _ in range(num_layers))
        # Not in the checkpoint: `_init_weights` fills it again after an initialisation on the meta device.
        buckets = text_relative_buckets(config.token_bucket_size).to(self.pos_ln.weight.device)
        self.register_buffer("text_buckets", buckets, persistent=False)

    def is_no_padding(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mask [batch, length] of what is not `pad_token_id`."""
        pad_token_id = self.config.pad_token_id
        return torch.ones_like(input_ids, dtype=torch.bool) if pad_token_id is None else input_ids.ne(pad_token_id)

    def check_length(self, length: int) -> None:
        """Raises `ValueError` if a text of this many tokens has no positions."""
        limit = min(self.embed_positions.num_embeddings, MAX_TEXT_POSITIONS)
        if length > limit:
            raise ValueError(f"{type(self).__name__} got a text of {length} tokens; its positions end at {limit}.")

    def position_bias(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Scaled products of projected positions [batch or 1, n, d_model]: [batch or 1, heads, queries, keys]."""
        return torch.matmul(self.split_heads(queries) * self.position_scaling, self.split_heads(keys).transpose(2, 3))

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, heads, n, head_dim] of [batch, n, d_model]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def text_relative_bias(self, layer_idx: int, buckets: torch.Tensor) -> torch.Tensor:
        """The layer's bias of relative text positions, [1, heads, queries, keys], for buckets [queries, keys]."""
        return self.token_rel_pos_tables[layer_idx](buckets).permute(2, 0, 1)[None]

    def image_relative_bias(self, layer_idx: int, buckets: torch.Tensor) -> torch.Tensor:
        """The layer's bias of relative image positions, [1, heads, queries, keys], for buckets [queries, keys]."""
        table, rows = self.image_rel_pos_tables[layer_idx], (2 * self.config.image_bucket_size - 1) ** 2 + 3
        if torch.is_grad_enabled() or buckets.numel() < rows:
            return table(buckets).permute(2, 0, 1)[None]
        # One head after the other: what adds this to scores reads it in the order of memory.
        by_head = table(torch.arange(rows, device=buckets.device)).t().contiguous()
        return by_head.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)[None]

    def patch_relative_bias(self, layer_idx: int, rows: int, columns: int) -> list[torch.Tensor]:
        """The layer's bias of a grid of patches among themselves, `image_relative_bias` without an index of every
        pair: one tensor [heads, columns, rows * columns] for each row of queries.

        It depends on the differences of rows and of columns only. What is looked up are all differences of rows for
        each pair of columns; a row of queries is a window of that, which shares its memory.
        """
        limit = self.config.image_bucket_size
        side = 2 * limit - 1
        table: Any = self.image_rel_pos_tables[layer_idx].weight
        by_difference = table[: side**2].unflatten(0, (side, side))
        places = torch.arange(columns, device=by_difference.device)
        # [row difference, query column, key column, heads], from keys far above the query to keys far below it.
        pairs = by_difference.flip(0)[:, places[:, None] - places[None, :] + limit - 1]
        windows = pairs.permute(3, 1, 0, 2).contiguous()
        return [windows[:, :, limit - 1 - row :][:, :, :rows].flatten(2) for row in range(rows)]

    def text_relative_buckets(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Buckets [queries, keys] of text positions, int64 [queries] and [keys], smaller than `MAX_TEXT_POSITIONS`."""
        return self.text_buckets[queries[:, None] - keys[None, :] + MAX_TEXT_POSITIONS - 1]

    def skips_layer(self, probability: float) -> bool:
        """LayerDrop: whether this layer is left out of this training step."""
        return self.training and probability > 0.0 and torch.rand([]).item() < probability


class OFAEncoder(OFAStack):
    """Encodes an image's patches and a text as one sequence, patches first."""

    _can_record_outputs = {"hidden_states": OFAEncoderLayer, "attentions": OFAAttention}

    def __init__(self, config: OFAConfig):
        super().__init__(config, config.encoder_layers, config.encoder_attention_heads, config.max_position_embeddings)
        self.type_embedding = nn.Embedding(2, config.d_model) if config.add_type_embedding else None
        self.vision_tower = build_vision_tower(config)
        self.image_proj = nn.Linear(vision_channels(config), config.d_model)
        self.patch_layernorm_embedding = nn.LayerNorm(config.d_model) if config.patch_layernorm_embedding else None
        self.pos_q_linear = nn.Linear(config.d_model, config.d_model)
        self.pos_k_linear = nn.Linear(config.d_model, config.d_model)
        rates = torch.linspace(0, config.encoder_drop_path_rate, config.encoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(OFAEncoderLayer(config, rate, layer_idx) for layer_idx, rate in enumerate(rates))
        self.layer_norm = nn.LayerNorm(config.d_model) if config.encoder_normalize_before else None
        self.gradient_checkpointing = False
        self.post_init()

    def train(self, mode: bool = True):
        """As [`nn.Module.train`], but the batch norms of a frozen image tower keep their statistics."""
        super().train(mode)
        self._hold_statistics_of_frozen_tower()
        return self

    def _hold_statistics_of_frozen_tower(self) -> None:
        if self.training and not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            for _, _, norm in batch_norms(self.vision_tower):
                norm.eval()

    def _embed_text(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.config.entangle_position_embedding:
            inputs_embeds = inputs_embeds + positions
        if self.type_embedding is not None:
            inputs_embeds = inputs_embeds + self.type_embedding.weight[0]
        if self.layernorm_embedding is not None:
            inputs_embeds = self.layernorm_embedding(inputs_embeds)
        return nn.functional.dropout(inputs_embeds, p=self.dropout, training=self.training)

    def _embed_patches(self, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        patches = self.image_proj(features.flatten(2).transpose(1, 2)) * self.embed_tokens.embed_scale
        if self.config.entangle_position_embedding:
            patches = patches + positions
        if self.type_embedding is not None:
            patches = patches + self.type_embedding.weight[1]
        if self.patch_layernorm_embedding is not None:
            patches = self.patch_layernorm_embedding(patches)
        return nn.functional.dropout(patches, p=self.dropout, training=self.training)

    def _patch_positions(self, ids: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Absolute position embeddings of the patches, [rows * columns, d_model]; resized for a large image."""
        trained = self.config.orig_patch_image_size // PATCH_STRIDE
        if not self.config.interpolate_position or rows * columns <= trained**2:
            return self.embed_image_positions(ids)
        trained_ids = patch_position_ids(trained, trained, self.config.image_bucket_size, ids.device)
        grid = self.embed_image_positions(trained_ids).view(1, trained, trained, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
        return grid.flatten(2)[0].transpose(0, 1)

    def _image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features [batch, channels, rows, columns] of the image tower."""
        self._hold_statistics_of_frozen_tower()
        features = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state
        rows, columns = features.shape[-2:]
        limit = self.config.image_bucket_size
        if rows > limit or columns > limit:
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"An image of {height} x {width} pixels gives {rows} x {columns} patches; the position tables hold "
                f"{limit} x {limit}. Resize images to {limit * PATCH_STRIDE} pixels or less."
            )
        return features

    def _write_layer_bias(
        self,
        bias: torch.Tensor,
        absolute_bias: torch.Tensor,
        layer_idx: int,
        text_buckets: torch.Tensor,
        grid: tuple[int, int],
    ) -> None:
        """Makes `bias` [batch or 1, heads, source, source], the absolute one or that of another layer, the layer's.

        Between patches and text it is the absolute one in every layer. Without gradients only: a backward pass would
        need what is written over, and walk through every write.
        """
        patches = grid[0] * grid[1]
        text = bias[:, :, patches:, patches:]
        text.copy_(absolute_bias[:, :, patches:, patches:]).add_(self.text_relative_bias(layer_idx, text_buckets))
        by_row = self.patch_relative_bias(layer_idx, *grid)
        for start, relative in zip(range(0, patches, max(grid[1], 1)), by_row):
            # One row of patches at a time stays in the processor's cache.
            row = slice(start, start + grid[1])
            bias[:, :, row, :patches].copy_(absolute_bias[:, :, row, :patches]).add_(relative)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_masks: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OFAEncoderOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, text_length)`): the text.
            attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`): 1 for text that is no padding; what
                is not `pad_token_id` if not given.
            pixel_values (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`): one image a sample.
            patch_masks (`torch.BoolTensor` of shape `(batch_size,)`): False for a sample without an image, whose
                `pixel_values` are a filler; all True if not given.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, text_length, d_model)`): embedded text, in place
                of `input_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds, one of them.")
        if attention_mask is None and input_ids is not None:
            attention_mask = self.is_no_padding(input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, text_length = inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones((batch_size, text_length), dtype=torch.bool)
        if attention_mask.shape != (batch_size, text_length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it masks the text only, so "
                f"{(batch_size, text_length)} is needed (patch_masks masks images)."
            )
        self.check_length(text_length)

        source_mask = attention_mask.bool()
        text_positions = torch.arange(text_length, device=inputs_embeds.device)
        text_embeddings = self.embed_positions(text_positions)
        hidden_states = self._embed_text(inputs_embeds, text_embeddings)
        positions = self.pos_ln(text_embeddings)
        text_buckets, grid = self.text_relative_buckets(text_positions, text_positions), (0, 0)

        if pixel_values is not None:
            features = self._image_features(pixel_values)
            rows, columns = features.shape[-2:]
            grid = (rows, columns)
            patch_ids = patch_position_ids(rows, columns, self.config.image_bucket_size, features.device)
            patch_embeddings = self._patch_positions(patch_ids, rows, columns)
            hidden_states = torch.cat([self._embed_patches(features, patch_embeddings), hidden_states], dim=1)
            positions = torch.cat([self.image_pos_ln(patch_embeddings), positions], dim=0)
            if patch_masks is None:
                patch_masks = source_mask.new_ones(batch_size)
            patch_mask = patch_masks.to(source_mask)[:, None].expand(batch_size, rows * columns)
            source_mask = torch.cat([patch_mask, source_mask], dim=1)

        hidden_states = hidden_states * source_mask[:, :, None].to(hidden_states.dtype)
        positions = positions[None]
        absolute_bias = mask_position_bias(
            self.position_bias(self.pos_q_linear(positions), self.pos_k_linear(positions)),
            create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=source_mask),
        )
        bias, patch_buckets = None, None
        if torch.is_grad_enabled() and pixel_values is not None:
            patch_buckets = image_relative_buckets(patch_ids, patch_ids, self.config.image_bucket_size)
        for layer_idx, layer in enumerate(self.layers):
            if self.skips_layer(self.config.encoder_layerdrop):
                continue
            if torch.is_grad_enabled():
                bias = absolute_bias.clone()
                bias[:, :, -text_length:, -text_length:] += self.text_relative_bias(layer_idx, text_buckets)
                if patch_buckets is not None:
                    bias[:, :, :-text_length, :-text_length] += self.image_relative_bias(layer_idx, patch_buckets)
            else:
                bias = absolute_bias.clone() if bias is None else bias
                self._write_layer_bias(bias, absolute_bias, layer_idx, text_buckets, grid)
            hidden_states = layer(hidden_states, bias, **kwargs)
        if self.layer_norm is not None:
            hidden_states = self.layer_norm(hidden_states)
        return OFAEncoderOutput(
            last_hidden_state=hidden_states,
            attention_mask=source_mask,
            position_embeddings=positions.expand(batch_size, -1, -1),
        )


# Where a recorder can be told (transformers 5.23), hidden states counted from the last need the decoder's own number.
_COUNTED: dict[str, Any] = (
    {"num_hidden_layers_key": "decoder_layers"} if hasattr(OutputRecorder, "num_hidden_layers_key") else {}
)


class OFADecoder(OFAStack):
    """Decodes text, or the codes of an image, from what the encoder made of the source."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(OFADecoderLayer, **_COUNTED),
        "attentions": OutputRecorder(OFAAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(OFAAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: OFAConfig):
        super().__init__(
            config, config.decoder_layers, config.decoder_attention_heads, config.decoder_max_position_embeddings
        )
        self.code_layernorm_embedding = nn.LayerNorm(config.d_model) if config.code_layernorm_embedding else None
        self.self_pos_q_linear = nn.Linear(config.d_model, config.d_model)
        self.self_pos_k_linear = nn.Linear(config.d_model, config.d_model)
        self.cross_pos_q_linear = nn.Linear(config.d_model, config.d_model)
        self.cross_pos_k_linear = nn.Linear(config.d_model, config.d_model)
        rates = torch.linspace(0, config.decoder_drop_path_rate, config.decoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(OFADecoderLayer(config, rate, layer_idx) for layer_idx, rate in enumerate(rates))
        self.layer_norm = nn.LayerNorm(config.d_model) if config.decoder_normalize_before else None
        self.gradient_checkpointing = False
        self.post_init()

    def source_position_keys(self, position_embeddings: torch.Tensor) -> torch.Tensor:
        """The source's positions as keys of the cross-attention: [batch, heads, source_length, head_dim]."""
        # Samples of one encoder call share their positions (an expanded tensor): they are projected once.
        rows = position_embeddings[:1] if position_embeddings.stride(0) == 0 else position_embeddings
        keys = self.split_heads(self.cross_pos_k_linear(rows))
        return keys.expand(position_embeddings.shape[0], -1, -1, -1)

    def _check_code_length(self, length: int, code_masks: torch.Tensor) -> None:
        window = self.config.code_image_size // CODE_STRIDE
        rows = self.embed_image_positions.num_embeddings
        fits = window <= self.config.image_bucket_size and (length <= window**2 + 1 or rows > BEYOND_CODE_WINDOW)
        if not fits and code_masks.any():
            raise ValueError(
                f"A target of {length} image codes has no positions: code_image_size {self.config.code_image_size} "
                f"makes {window} x {window} codes after the start token, and the tables have {rows} image positions."
            )

    def _embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor, is_code: torch.Tensor | None):
        """Hidden states before the first layer; `positions` are the raw position embeddings of the inputs."""
        if not self.config.disable_entangle:
            inputs_embeds = inputs_embeds + positions
        if self.layernorm_embedding is not None:
            text = self.layernorm_embedding(inputs_embeds)
            if is_code is not None and self.code_layernorm_embedding is not None:
                text = torch.where(is_code, self.code_layernorm_embedding(inputs_embeds), text)
            inputs_embeds = text
        return nn.functional.dropout(inputs_embeds, p=self.dropout, training=self.training)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_position_embeddings: torch.Tensor,
        encoder_position_keys: torch.Tensor | None = None,
        code_masks: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`): the target so far, from the start
                token on, or what follows the tokens in `past_key_values`.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + target_length)`): 1 for what is no
                padding; without a past, what is not `pad_token_id` if not given.
            encoder_hidden_states, encoder_attention_mask, encoder_position_embeddings, encoder_position_keys: the
                fields of [`OFAEncoderOutput`]; the keys are computed if not given. Of fewer samples than the target,
                each is the source of as many consecutive ones: the beams of a sample share what is computed of it.
            code_masks (`torch.BoolTensor` of shape `(batch_size,)`): True for samples whose target is the codes of an
                image; no sample's is if not given.
            past_key_values (`Cache`): keys and values of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, d_model)`): embedded target, in
                place of `input_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either decoder_input_ids or decoder_inputs_embeds, one of them.")
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None and input_ids is not None and isinstance(past_length, int) and past_length == 0:
            attention_mask = self.is_no_padding(input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        target_length = inputs_embeds.shape[1]
        beams, rest = divmod(inputs_embeds.shape[0], encoder_hidden_states.shape[0])
        if rest or not beams:
            raise ValueError(
                f"{inputs_embeds.shape[0]} targets cannot share {encoder_hidden_states.shape[0]} encoded sources."
            )
        if isinstance(past_length, int):
            self.check_length(past_length + target_length)
            if code_masks is not None:
                self._check_code_length(past_length + target_length, code_masks)

        self_attention_cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            self_attention_cache = past_key_values.self_attention_cache
        causal_mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=self_attention_cache,
            allow_is_causal_skip=False,
        )
        source_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds[::beams],
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        if encoder_position_keys is None:
            encoder_position_keys = self.source_position_keys(encoder_position_embeddings)

        # A cache of fixed size has more keys than there are positions; the mask hides them.
        limit = min(self.embed_positions.num_embeddings, MAX_TEXT_POSITIONS) - 1
        queries = torch.arange(target_length, device=inputs_embeds.device) + past_length
        keys = torch.arange(causal_mask.shape[-1], device=inputs_embeds.device).clamp(max=limit)
        text_buckets = self.text_relative_buckets(queries, keys)
        embeddings = self.embed_positions(keys)[None]
        self_bias, cross_queries = self._project_positions(self.pos_ln(embeddings), queries)
        embeddings, is_code, code_buckets = embeddings[:, queries], None, None

        if code_masks is not None:
            is_code = code_masks.bool()[:, None, None]
            code_ids = code_position_ids(keys, self.config.code_image_size, self.config.image_bucket_size)
            code_buckets = image_relative_buckets(code_ids[queries], code_ids, self.config.image_bucket_size)
            code_embeddings = self.embed_image_positions(code_ids)[None]
            code_bias, code_queries = self._project_positions(self.image_pos_ln(code_embeddings), queries)
            embeddings = torch.where(is_code, code_embeddings[:, queries], embeddings)
            self_bias = torch.where(is_code[..., None], code_bias, self_bias)
            cross_queries = torch.where(is_code[..., None], code_queries, cross_queries)

        self_bias = mask_position_bias(self_bias, causal_mask)
        cross_bias = self._cross_bias(cross_queries, encoder_position_keys, source_mask, beams)

        hidden_states = self._embed(inputs_embeds, embeddings, is_code)
        for layer_idx, layer in enumerate(self.layers):
            if self.skips_layer(self.config.decoder_layerdrop):
                continue
            relative_bias = self.text_relative_bias(layer_idx, text_buckets)
            if is_code is not None and code_buckets is not None:
                code_bias = self.image_relative_bias(layer_idx, code_buckets)
                relative_bias = torch.where(is_code[..., None], code_bias, relative_bias)
            hidden_states = layer(
                hidden_states,
                self_bias + relative_bias,
                encoder_hidden_states,  # positional, so that gradient checkpointing sees that it requires a gradient
                cross_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
        if self.layer_norm is not None:
            hidden_states = self.layer_norm(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )

    def _cross_bias(self, queries: torch.Tensor, keys: torch.Tensor, source_mask: Any, beams: int) -> torch.Tensor:
        """Cross-attention's bias with the mask in it, [batch, heads, beams * queries, keys], of position queries that
        are one for all targets (a first axis of 1) or each target's own."""
        if queries.shape[0] > keys.shape[0]:
            # Whether a target is codes is said for each beam, and is the same for those of one sample.
            queries = queries[::beams]
        bias = mask_position_bias(torch.matmul(queries, keys.transpose(2, 3)), source_mask)
        return bias[:, :, None].expand(-1, -1, beams, -1, -1).flatten(2, 3) if beams > 1 else bias

    def _project_positions(self, positions: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Self-attention's absolute bias and cross-attention's scaled position queries, for all positions given."""
        query_positions = positions[:, queries]
        self_bias = self.position_bias(self.self_pos_q_linear(query_positions), self.self_pos_k_linear(positions))
        return self_bias, self.split_heads(self.cross_pos_q_linear(query_positions)) * self.position_scaling


class OFAModel(OFAPreTrainedModel):
    """Encoder and decoder of OFA, without the output projection."""

    def __init__(self, config: OFAConfig):
        super().__init__(config)
        if config.share_all_embeddings:
            self._tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}
        self.encoder = OFAEncoder(config)
        self.decoder = OFADecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        if self.config.share_all_embeddings and self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_masks: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        code_masks: torch.Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """See [`OFAEncoder.forward`] for the source's arguments, [`OFADecoder.forward`] for the target's.

        `encoder_outputs` is an [`OFAEncoderOutput`], or the tuple of its first three fields; the source's arguments
        are ignored if it is given.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                patch_masks=patch_masks,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        elif isinstance(encoder_outputs, (tuple, list)) and len(encoder_outputs) >= 3:
            encoder_outputs = OFAEncoderOutput(*encoder_outputs[:3])
        if not isinstance(encoder_outputs, OFAEncoderOutput) or encoder_outputs.position_embeddings is None:
            raise ValueError(
                "encoder_outputs must be what this model's encoder returned: its attention_mask and "
                f"position_embeddings are needed, and {type(encoder_outputs).__name__} has none."
            )

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=encoder_outputs.attention_mask,
            encoder_position_embeddings=encoder_outputs.position_embeddings,
            # Kept by generation; with gradients they have to be computed from today's weights.
            encoder_position_keys=None if torch.is_grad_enabled() else encoder_outputs.position_keys,
            code_masks=code_masks,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class OFAForConditionalGeneration(OFAPreTrainedModel, OFAGenerationMixin):
    """OFA with its output projection: captions, answers, boxes, image codes, whatever its vocabulary spells."""

    def __init__(self, config: OFAConfig):
        super().__init__(config)
        embedded_by = "encoder" if config.share_all_embeddings else "decoder"
        self._tied_weights_keys = {"lm_head.weight": f"model.{embedded_by}.embed_tokens.weight"}
        self.model = OFAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()
        self._set_generation_defaults()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As [`PreTrainedModel.resize_token_embeddings`]; the decoder's own table, if it has one, is resized too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        decoder = self.model.decoder
        if decoder.embed_tokens.num_embeddings != embeddings.num_embeddings:
            decoder.embed_tokens = self._get_resized_embeddings(decoder.embed_tokens, embeddings.num_embeddings)
            self.tie_weights()
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs for `labels`, int64 [batch, length]: the start token, then all labels but the last."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_masks: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        code_masks: torch.Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        label_smoothing: float | None = None,
        confidence: torch.Tensor | None = None,
        drop_worst_ratio: float = 0.0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""See [`OFAEncoder.forward`] for the source's arguments, [`OFADecoder.forward`] for the target's.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`): the target, ending with the end token;
                -100 and `pad_token_id` are ignored. `decoder_input_ids` are made of them if not given.
            label_smoothing (`float`): in place of `config.label_smoothing`.
            confidence, drop_worst_ratio, and `num_items_in_batch`, which `Trainer` passes: see
                [`ofa_label_smoothed_loss`].
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            patch_masks=patch_masks,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            code_masks=code_masks,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        loss = None
        if labels is not None:
            loss = ofa_label_smoothed_loss(
                logits,
                labels.to(logits.device),
                self.config.label_smoothing if label_smoothing is None else label_smoothing,
                pad_token_id=self.config.pad_token_id,
                confidence=confidence,
                drop_worst_ratio=drop_worst_ratio,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


__all__ = [
    "OFADecoder",
    "OFAEncoder",
    "OFAEncoderOutput",
    "OFAForConditionalGeneration",
    "OFAModel",
    "OFAPreTrainedModel",
    "ofa_label_smoothed_loss",
]
