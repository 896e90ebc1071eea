"""Registers our families with transformers' Auto classes, as a library of models does."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    Blip2Processor,
)

from .blip2_lavis.configuration_blip2_lavis import Blip2LavisConfig
from .blip2_lavis.modeling_blip2_lavis import Blip2LavisForConditionalGeneration, Blip2LavisForImageTextRetrieval
from .florence2.chat_templates import accept_chat_templates
from .moondream.configuration_moondream import MoondreamConfig
from .moondream.image_processing_moondream import MoondreamImageProcessor
from .moondream.modeling_moondream import MoondreamForConditionalGeneration, MoondreamModel
from .moondream.processing_moondream import MoondreamProcessor
from .ofa.configuration_ofa import OFAConfig, OFAVisionConfig
from .ofa.image_processing_ofa import OFAImageProcessor
from .ofa.modeling_ofa import OFAForConditionalGeneration, OFAModel
from .ofa.processing_ofa import OFAProcessor
from .ofa.vision_ofa import OFAVisionModel

CONFIGS = (OFAConfig, OFAVisionConfig, Blip2LavisConfig, MoondreamConfig)

MODELS = (
    (AutoModel, OFAConfig, OFAModel),
    (AutoModel, OFAVisionConfig, OFAVisionModel),
    (AutoModelForImageTextToText, OFAConfig, OFAForConditionalGeneration),
    (AutoModelForMultimodalLM, OFAConfig, OFAForConditionalGeneration),
    (AutoModelForSeq2SeqLM, OFAConfig, OFAForConditionalGeneration),
    (AutoModel, MoondreamConfig, MoondreamModel),
    (AutoModelForImageTextToText, MoondreamConfig, MoondreamForConditionalGeneration),
    (AutoModelForMultimodalLM, MoondreamConfig, MoondreamForConditionalGeneration),
    (AutoModelForImageTextToText, Blip2LavisConfig, Blip2LavisForConditionalGeneration),
    (AutoModelForMultimodalLM, Blip2LavisConfig, Blip2LavisForConditionalGeneration),
    (AutoModelForZeroShotImageClassification, Blip2LavisConfig, Blip2LavisForImageTextRetrieval),
)

IMAGE_PROCESSORS = ((OFAConfig, OFAImageProcessor), (MoondreamConfig, MoondreamImageProcessor))

PROCESSORS = ((OFAConfig, OFAProcessor), (Blip2LavisConfig, Blip2Processor), (MoondreamConfig, MoondreamProcessor))


def register() -> None:
    """Register every family; doing it again changes nothing."""
    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto_class, config, model in MODELS:
        auto_class.register(config, model, exist_ok=True)
    for config, image_processor in IMAGE_PROCESSORS:
        AutoImageProcessor.register(config, slow_image_processor_class=image_processor, exist_ok=True)
    for config, processor in PROCESSORS:
        AutoProcessor.register(config, processor, exist_ok=True)
    accept_chat_templates()
