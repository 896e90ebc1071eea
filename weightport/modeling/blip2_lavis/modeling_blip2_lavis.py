"""BLIP-2 as LAVIS computes it, composed of transformers' vision encoders, Q-Former and language models.

Two things that transformers' BLIP-2 cannot hold: CLIP's ViT-L, which has a norm before its layers, fast GELUs and no
bias in its patch embedding; and the epsilon of the norm between vision encoder and Q-Former. A Flan-T5's output head
is its own here, whatever T5's configuration says of tied embeddings.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPVisionModel,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2TextEmbeddings,
    Blip2VisionModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_blip2_lavis import Blip2LavisConfig


class Blip2LavisClipVisionModel(CLIPVisionModel):
    """CLIP's vision encoder, whose every state goes through the last norm, which is LAVIS's and no part of CLIP."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """pixel_values [batch, 3, height, width] → last_hidden_state [batch, 1 + patches, width]."""
        embedded = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        encoded = self.encoder(inputs_embeds=self.pre_layrnorm(embedded), **kwargs).last_hidden_state
        states = self.post_layernorm(encoded)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


def vision_model_of(config: Blip2LavisConfig) -> Blip2VisionModel | Blip2LavisClipVisionModel:
    """The vision encoder of `config`, with the epsilon that its last norm has."""
    vision: Any = config.vision_config
    model_class = Blip2LavisClipVisionModel if vision.model_type == "clip_vision_model" else Blip2VisionModel
    model = model_class._from_config(vision)
    model.post_layernorm.eps = config.ln_vision_eps
    return model


class Blip2LavisForConditionalGeneration(Blip2ForConditionalGeneration):
    """Captions and answers: vision encoder, Q-Former, projection, OPT or T5."""

    config: Blip2LavisConfig
    _no_split_modules = [*(Blip2PreTrainedModel._no_split_modules or []), "CLIPEncoderLayer", "CLIPVisionEmbeddings"]

    def __init__(self, config: Blip2LavisConfig) -> None:
        Blip2PreTrainedModel.__init__(self, config)
        qformer: Any = config.qformer_config
        text: Any = config.text_config
        self.vision_model = vision_model_of(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, qformer.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(qformer)
        self.language_projection = nn.Linear(qformer.hidden_size, text.hidden_size)
        causal = config.use_decoder_only_language_model
        self.language_model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_config(text)
        if text.model_type == "t5" and not text.scale_decoder_outputs:
            # T5's configuration says that the head is the embedding; of T5 1.1 and Flan-T5 it never is.
            head = self.language_model.lm_head
            head.weight = nn.Parameter(head.weight.detach().clone())
            tied = dict(self.language_model._tied_weights_keys)
            tied.pop("lm_head.weight", None)
            self.language_model._tied_weights_keys = tied
            self.language_model.all_tied_weights_keys = self.language_model.get_expanded_tied_weights_keys(
                all_submodels=True
            )
        self.post_init()

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As [`Blip2ForConditionalGeneration`]. A T5 with more layers in its decoder than in its encoder is given a
        cache that grows with what is put into it: transformers makes one by the number of the encoder's."""
        text: Any = self.config.text_config
        settings = kwargs.get("generation_config") or self.language_model.generation_config
        uneven = text.model_type == "t5" and text.num_decoder_layers != text.num_layers
        if uneven and kwargs.get("use_cache", settings.use_cache) is not False:
            kwargs.setdefault("past_key_values", EncoderDecoderCache(DynamicCache(), DynamicCache()))
        return super().generate(*args, **kwargs)


class Blip2LavisForImageTextRetrieval(Blip2ForImageTextRetrieval):
    """Matching and contrast of pictures and texts: vision encoder, Q-Former, two projections, matching head."""

    config: Blip2LavisConfig
    _no_split_modules = Blip2LavisForConditionalGeneration._no_split_modules

    def __init__(self, config: Blip2LavisConfig) -> None:
        Blip2PreTrainedModel.__init__(self, config)
        qformer: Any = config.qformer_config
        self.vision_model = vision_model_of(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, qformer.hidden_size))
        self.embeddings = Blip2TextEmbeddings(qformer)
        self.qformer = Blip2QFormerModel._from_config(qformer)
        self.vision_projection = nn.Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.text_projection = nn.Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.post_init()


__all__ = ["Blip2LavisForConditionalGeneration", "Blip2LavisForImageTextRetrieval"]
