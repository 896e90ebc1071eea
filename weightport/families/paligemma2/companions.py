"""What stands beside the weights of a converted PaliGemma: configuration, generation settings, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightport.checkpoints import Checkpoint
from weightport.checkpoints.formats.trainer_folder import FORMAT as TRAINER_FOLDER
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan
from weightport.converters.processor import Processor
from weightport.families.paligemma2.configuration import BOS, EOS, PAD
from weightport.families.paligemma2.options import PaliGemmaOptions

NO_VOCABULARY = "none"
NEW_TOKENS = 256
"""Of an answer, where nobody says: what the published notebooks ask for."""
RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers. The original resizes with antialiased bilinear weights, within two grey levels of Pillow's
bilinear; bicubic, which the published processors have, differs visibly."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""A chat's prompt is its images and its text, as the processor takes them: PaliGemma answers, it does not converse."""


def write(model: SourceModel, plan: Plan, folder: Path) -> None:
    """Write the companions of `model` into `folder`, where the processor, if any, is saved already."""
    from transformers import PaliGemmaForConditionalGeneration

    config: Any = model.config
    config.dtype = plan.dtype
    config.architectures = [PaliGemmaForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    settings = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def vocabulary_source(checkpoint: Checkpoint, options: PaliGemmaOptions) -> str | Path | None:
    """Where the tokenizer is read from: what the user named, or what stands beside the checkpoint; None when there is
    none."""
    from weightport.families.paligemma2.tokenizer import vocabulary_file

    if options.vocabulary == NO_VOCABULARY:
        return None
    if options.vocabulary is not None:
        return options.vocabulary
    # A trainer's step is a folder of arrays: what belongs to it stands beside it.
    folder = checkpoint.folder.parent if checkpoint.format == TRAINER_FOLDER else checkpoint.folder
    return vocabulary_file(folder)


def build_processor(model: SourceModel, checkpoint: Checkpoint, options: PaliGemmaOptions) -> Processor | None:
    """The processor of `model`, None where there is no tokenizer. Raises VocabularyError when the tokenizer does not
    fit."""
    source = vocabulary_source(checkpoint, options)
    if source is None:
        return None
    from transformers import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from weightport.families.paligemma2.tokenizer import build_tokenizer, check_fit, read_vocabulary

    config: Any = model.config
    vocabulary = read_vocabulary(source)
    check_fit(vocabulary, config.image_token_index)
    side = config.vision_config.image_size
    images = SiglipImageProcessorPil(
        size={"height": side, "width": side},
        resample=RESAMPLE[options.resample],
        image_seq_length=(side // config.vision_config.patch_size) ** 2,
    )
    processor = PaliGemmaProcessor(
        image_processor=images, tokenizer=build_tokenizer(vocabulary), chat_template=CHAT_TEMPLATE
    )
    return Processor(processor, vocabulary.provenance)
