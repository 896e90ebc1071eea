"""Where `trust_remote_code` finds weightport's own BLIP-2, in a directory with the model's code in it."""

from __future__ import annotations

from weightport.converters.portable import AutoMap

CODE = "weightport.modeling.blip2_lavis"
GENERATES, RETRIEVES = "Blip2LavisForConditionalGeneration", "Blip2LavisForImageTextRetrieval"
CONFIG = "configuration_blip2_lavis.Blip2LavisConfig"
MODEL = "modeling_blip2_lavis."

AUTO_MAPS = (
    AutoMap("config.json", None, "AutoConfig", CONFIG, (GENERATES, RETRIEVES)),
    AutoMap("config.json", None, "AutoModelForImageTextToText", MODEL + GENERATES, (GENERATES,)),
    AutoMap("config.json", None, "AutoModelForMultimodalLM", MODEL + GENERATES, (GENERATES,)),
    AutoMap("config.json", None, "AutoModelForZeroShotImageClassification", MODEL + RETRIEVES, (RETRIEVES,)),
)
"""Models of transformers' own class need none of it; the processor is transformers' in any case."""
