"""Where `trust_remote_code` finds the classes of a directory with the model's code in it."""

from __future__ import annotations

from weightport.converters.portable import AutoMap

AUTO_MAPS = (
    AutoMap("config.json", None, "AutoConfig", "configuration_ofa.OFAConfig"),
    AutoMap("config.json", None, "AutoModel", "modeling_ofa.OFAModel"),
    AutoMap("config.json", None, "AutoModelForImageTextToText", "modeling_ofa.OFAForConditionalGeneration"),
    AutoMap("config.json", None, "AutoModelForSeq2SeqLM", "modeling_ofa.OFAForConditionalGeneration"),
    AutoMap("processor_config.json", None, "AutoProcessor", "processing_ofa.OFAProcessor"),
    AutoMap(
        "processor_config.json", "image_processor", "AutoImageProcessor", "image_processing_ofa.OFAImageProcessor"
    ),
)
