"""moondream2 for transformers 5: a SigLIP tower, a two-layer projector, and Phi, in one class for all its revisions.

Revisions differ in what the projector sees of a picture (one view, a whole view beside crops, overlapping tiles) and
in whether the image is attended to in both directions. Nothing here is computed in a constructor that loading on the
meta device would lose: what is no parameter is made in `_init_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PhiModel, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_moondream import MoondreamConfig
from .generation_moondream import MoondreamGenerationMixin, bidirectional_prefix
from .region_moondream import MoondreamBinRegionHead, MoondreamPointRegionHead, build_region_head
from .views_moondream import merge_views

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.23

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """The last `logits_to_keep` positions (0: all), or those that a 1-D tensor names, of every sample."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


@dataclass
class MoondreamModelOutputWithPast(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): after the norm.
        past_key_values (`Cache`), hidden_states, attentions: of the text model, on request.
        image_hidden_states (`torch.FloatTensor` of shape `(images, image_seq_length, hidden_size)`): what stands at
            the image's places.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class MoondreamCausalLMOutputWithPast(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): mean cross-entropy over the labels that are not -100.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`).
        past_key_values (`Cache`), hidden_states, attentions: of the text model, on request.
        image_hidden_states: see [`MoondreamModelOutputWithPast`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class MoondreamMultiModalProjector(nn.Module):
    """Features [..., width of the tower, or twice that] → vectors of the text model's width."""

    def __init__(self, config: MoondreamConfig):
        super().__init__()
        views = 1 if config.feature_merge == "none" else 2
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.linear_1 = nn.Linear(views * vision.hidden_size, config.projector_hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.projector_hidden_size, text.hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


class MoondreamPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the library has to know about every Moondream model."""

    config_class = MoondreamConfig
    config: MoondreamConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiDecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = False
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MoondreamBinRegionHead):
            init.normal_(module.coord_features)
            init.normal_(module.size_features)
        elif isinstance(module, MoondreamPointRegionHead):
            init.normal_(module.position_features)
            init.normal_(module.size_features)


class MoondreamModel(MoondreamPreTrainedModel):
    """Vision tower, projector and text model, without the head."""

    # A file of the whole has one, and the one for regions.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^region_head\."]

    def __init__(self, config: MoondreamConfig):
        super().__init__(config)
        self.vision_tower = SiglipVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = MoondreamMultiModalProjector(config)
        self.language_model = PhiModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """What stands at the places of pictures, as `pooler_output` [pictures, image_seq_length, hidden_size];
        `last_hidden_state` is what the projector made it of.

        Args:
            pixel_values: [pictures, 3, size, size] of one view each; [pictures, views, 3, size, size] of several: the
                whole picture, its crops row by row, padding.
            image_grids: int64 [pictures, 2], (rows, columns) of crops, zeros for none. Needed with several views.
        """
        several = self.config.feature_merge != "none"
        if pixel_values.ndim != (5 if several else 4):
            raise ValueError(
                f"pixel_values has the shape {list(pixel_values.shape)}; this revision takes [pictures, "
                f"{'views, ' if several else ''}3, height, width]."
            )
        if not several:
            outputs = self.vision_tower(pixel_values, **kwargs)
            outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state)
            return outputs
        if image_grids is None or len(image_grids) != len(pixel_values):
            raise ValueError("Pictures of several views need image_grids, the (rows, columns) of crops of each.")
        counts = [1 + rows * columns for rows, columns in image_grids.tolist()]
        if max(counts) > pixel_values.shape[1]:
            raise ValueError(f"image_grids has {max(counts) - 1} crops, pixel_values {pixel_values.shape[1] - 1}.")
        # Padding is not encoded.
        views = torch.cat([views[:count] for views, count in zip(pixel_values, counts)])
        outputs = self.vision_tower(views, **kwargs)
        features = nn.utils.rnn.pad_sequence(outputs.last_hidden_state.split(counts), batch_first=True)
        margin = self.config.overlap_margin if self.config.feature_merge == "tiles" else 0
        merged = merge_views(features, image_grids, margin)
        return BaseModelOutputWithPooling(
            last_hidden_state=merged,
            pooler_output=self.multi_modal_projector(merged),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embed(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(embeddings with the pictures' at their places, which places these are). Raises ValueError."""
        is_image = input_ids == self.config.image_token_id
        if self.config.image_token_id >= self.get_input_embeddings().num_embeddings:
            input_ids = input_ids.masked_fill(is_image, 0)
        embeds = self.get_input_embeddings()(input_ids)
        if image_features is None:
            return embeds, is_image
        return self._put(embeds, is_image, image_features), is_image

    def _put(self, embeds: torch.Tensor, is_image: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        places, vectors = int(is_image.sum()), image_features.shape[0] * image_features.shape[1]
        if places != vectors:
            raise ValueError(
                f"The text has {places} places for image vectors, the pictures give {vectors} "
                f"({image_features.shape[0]} of {image_features.shape[1]})."
            )
        return embeds.masked_scatter(is_image[..., None], image_features.to(embeds.device, embeds.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoondreamModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): start token, `image_seq_length`
                times `image_token_id`, text.
            pixel_values, image_grids: see [`MoondreamModel.get_image_features`]; one picture for each run of
                `image_token_id`, in the order of the batch.
            image_features (`torch.FloatTensor` of shape `(pictures, image_seq_length, hidden_size)`): what the
                pictures' `pooler_output` is, in place of `pixel_values`.
            inputs_embeds: in place of `input_ids`. With prefix attention, or with pictures, give both: ids say where
                images stand.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("MoondreamModel needs input_ids or inputs_embeds.")
        if pixel_values is not None and image_features is not None:
            raise ValueError("Give pixel_values or image_features, not both.")
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, image_grids).pooler_output
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds, is_image = self._embed(input_ids, image_features)
        else:
            is_image = self._image_places(input_ids, inputs_embeds)
            if image_features is not None:
                inputs_embeds = self._put(inputs_embeds, is_image, image_features)
        mask: Any = attention_mask
        # A mask of four axes is whole already.
        whole = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
        if self.config.prefix_bidirectional and not whole and bool(is_image.any()):
            text: Any = self.config.text_config
            if "flash" in (text._attn_implementation or ""):
                raise ValueError(
                    "Flash attention takes no mask in which an image is seen in both directions, and would leave it "
                    'out without a word: load this revision with attn_implementation="sdpa".'
                )
            mask = create_causal_mask(
                config=text,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                block_sequence_ids=bidirectional_prefix(is_image, attention_mask),
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return MoondreamModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _image_places(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Where images stand, bool [batch, length]: by ids, or where embeddings are those of `image_token_id`."""
        image_token_id, table = self.config.image_token_id, self.get_input_embeddings()
        if input_ids is not None:
            return input_ids == image_token_id
        if image_token_id >= table.num_embeddings:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        return (inputs_embeds == table.weight[image_token_id].to(inputs_embeds)).all(-1)


class MoondreamForConditionalGeneration(MoondreamPreTrainedModel, MoondreamGenerationMixin):
    """moondream2 with its head, which has a bias and is never tied, and its region head where it has one."""

    def __init__(self, config: MoondreamConfig):
        super().__init__(config)
        text: Any = config.text_config
        self.model = MoondreamModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=True)
        if config.region_config is not None:
            self.region_head = build_region_head(text.hidden_size, config.region_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See [`MoondreamModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grids, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoondreamCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): ids that the position before is to
                predict; -100 at the start token, at the image, at the question and at padding.
            logits_to_keep: how many last positions, or which, are given logits; 0 for all.
            The others are those of [`MoondreamModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.get_text_config().vocab_size, **kwargs
            )
        return MoondreamCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @contextmanager
    def states_before_last_norm(self) -> Iterator[list[torch.Tensor]]:
        """Collects, while the block runs, what goes into the text model's last norm: [batch, length, hidden_size] a
        call. The region head reads these."""
        seen: list[torch.Tensor] = []
        hook = self.model.language_model.final_layernorm.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        try:
            yield seen
        finally:
            hook.remove()


__all__ = [
    "MoondreamCausalLMOutputWithPast",
    "MoondreamForConditionalGeneration",
    "MoondreamModel",
    "MoondreamModelOutputWithPast",
    "MoondreamMultiModalProjector",
    "MoondreamPreTrainedModel",
]
