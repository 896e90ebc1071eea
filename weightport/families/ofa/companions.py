"""What stands beside the weights of a converted OFA: configuration, generation settings, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightport.checkpoints import Checkpoint
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan
from weightport.converters.portable import write_portable_code
from weightport.converters.processor import Processor
from weightport.errors import VocabularyError
from weightport.families.ofa.generation_config import beam_of, generation_config
from weightport.families.ofa.options import OFAOptions
from weightport.families.ofa.portable import AUTO_MAPS

IMAGENET_STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
MAX_IMAGE_SIZE = 512
"""Pixels that the last bin stands for, unless the task says otherwise (OFA's data classes)."""

VOCABULARY_FILES = ("dict.txt", "vocab.txt", "encoder.json", "vocab.json")


def write(model: SourceModel, plan: Plan, folder: Path, options: OFAOptions) -> None:
    """Write the companions of `model` into `folder`, where the processor, if any, is saved already."""
    from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

    config = model.config
    config.architectures = [OFAForConditionalGeneration.__name__]
    config.dtype = plan.dtype
    config.save_pretrained(folder)
    task = model.options["task"]
    settings = generation_config(task, beam_of(task, model.options["language"]))
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if options.portable:
        write_portable_code(folder, "weightport.modeling.ofa", AUTO_MAPS)


def build_processor(model: SourceModel, checkpoint: Checkpoint, options: OFAOptions) -> Processor | None:
    """The processor of `model`, None for --vocab none. Raises VocabularyError when the vocabulary does not fit."""
    if options.vocabulary == "none":
        return None
    from weightport.families.ofa.tokenizer import build_ofa_tokenizer
    from weightport.modeling.ofa.image_processing_ofa import OFAImageProcessor
    from weightport.modeling.ofa.processing_ofa import OFAProcessor
    from weightport.tokenizers.provenance import ofa_provenance

    task = model.options["task"]
    source = options.vocabulary or _vocabulary_beside(checkpoint)
    tokenizer = build_ofa_tokenizer(
        source,
        model.config.vocab_size,
        bpe=task.get("bpe"),
        num_bins=task.get("num_bins"),
        code_dict_size=task.get("code_dict_size"),
        parse_symbols=options.parse_symbols,
        model_max_length=model.config.max_position_embeddings,
    )
    size = model.config.image_size
    settings: dict[str, Any] = {"size": {"height": size, "width": size}}
    if task.get("imagenet_default_mean_and_std"):
        settings |= IMAGENET_STATISTICS
    if task.get("task") == "ocr":
        # Text in a picture would be squashed out of shape; the original fits such pictures instead.
        settings["keep_aspect_ratio"] = True
    images = OFAImageProcessor(**settings)
    largest = int(task.get("max_image_size") or MAX_IMAGE_SIZE)
    processor = OFAProcessor(image_processor=images, tokenizer=tokenizer, max_image_size=largest)
    return Processor(processor, ofa_provenance(source))


def _vocabulary_beside(checkpoint: Checkpoint) -> Path:
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise _missing_vocabulary(folder)
    return folder


def _missing_vocabulary(folder: Path) -> VocabularyError:
    """The error for a checkpoint that stands without its vocabulary."""
    return VocabularyError(
        f"No vocabulary: {folder} holds neither dict.txt nor vocab.txt, and --vocab was not given.\n"
        "  Pass --vocab with the folder of the OFA repository (utils/BERT_CN_dict for Chinese, utils/BPE for "
        "English),\n  a Hub id such as bert-base-chinese, or --vocab none to write the model without a tokenizer."
    )
