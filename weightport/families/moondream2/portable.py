"""Where `trust_remote_code` finds the classes of a directory with the model's code in it."""

from __future__ import annotations

from weightport.converters.portable import AutoMap

MODEL = "modeling_moondream.MoondreamForConditionalGeneration"
AUTO_MAPS = (
    AutoMap("config.json", None, "AutoConfig", "configuration_moondream.MoondreamConfig"),
    AutoMap("config.json", None, "AutoModel", "modeling_moondream.MoondreamModel"),
    AutoMap("config.json", None, "AutoModelForImageTextToText", MODEL),
    AutoMap("config.json", None, "AutoModelForMultimodalLM", MODEL),
    AutoMap("processor_config.json", None, "AutoProcessor", "processing_moondream.MoondreamProcessor"),
    AutoMap(
        "processor_config.json",
        "image_processor",
        "AutoImageProcessor",
        "image_processing_moondream.MoondreamImageProcessor",
    ),
)
