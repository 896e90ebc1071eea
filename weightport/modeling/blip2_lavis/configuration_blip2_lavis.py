"""Configuration of BLIP-2 as LAVIS computes it, for transformers 5."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2Config, Blip2QFormerConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class Blip2LavisConfig(Blip2Config):
    r"""Configuration of [`Blip2LavisForConditionalGeneration`] and [`Blip2LavisForImageTextRetrieval`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`): of `blip_2_vision_model` (EVA's ViT-g) or `clip_vision_model`
            (CLIP's ViT-L), by its `model_type`.
        ln_vision_eps (`float`, defaults to 1e-5): epsilon of the norm between vision encoder and Q-Former, which is
            trained with the Q-Former. [`Blip2Config`] has one epsilon for it and the vision encoder's own norms.
    """

    model_type = "blip-2-lavis"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_vision_model"),
        "qformer_config": SubConfigSpec(config_class=Blip2QFormerConfig),
    }

    ln_vision_eps: float = 1e-5
