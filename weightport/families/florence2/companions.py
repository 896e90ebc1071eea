"""What stands beside the weights of a converted Florence-2: configuration, generation settings, processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightport.checkpoints import Checkpoint
from weightport.checkpoints.json_text import parse_json
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan
from weightport.converters.processor import Processor
from weightport.errors import CheckpointError, ConfigurationError
from weightport.families.florence2.generation_config import generation_settings
from weightport.families.florence2.grounding import post_processor_config
from weightport.families.florence2.images import PREPROCESSOR, image_settings
from weightport.families.florence2.options import Florence2Options

NO_VOCABULARY = "none"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for part in message.content if part.type == 'text' %}{{ part.text | trim }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""A chat's prompt is its text, as the task token or question that the processor takes; the processor itself writes the
image's placeholders before it."""
_LARGEST_KEPT = 20_000  # characters; a fork's tokenizer_config.json lists its 1024 tokens a second time


def companion(checkpoint: Checkpoint, name: str) -> Any:
    """The JSON file `name` beside the weights, None when there is none. Raises CheckpointError for a malformed one."""
    return read_companion(checkpoint.folder / name)


def read_companion(path: Path) -> Any:
    """A JSON file, None when there is none. Raises CheckpointError for a malformed one."""
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} should be a JSON file, but cannot be read as one ({error}).") from error


def vocabulary_source(checkpoint: Checkpoint, options: Florence2Options) -> str | Path | None:
    """Where the tokenizer is read from: what the user named, or the checkpoint's folder; None when there is none."""
    if options.vocabulary == NO_VOCABULARY:
        return None
    if options.vocabulary is not None:
        return options.vocabulary
    found = any((checkpoint.folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return checkpoint.folder if found else None


def source_files(checkpoint: Checkpoint) -> dict[str, Any]:
    """The original's JSON files that an export gives back as they were (the small ones; tokens come from the
    tokenizer)."""
    names = ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
    found = {name: companion(checkpoint, name) for name in names}
    return {name: data for name, data in found.items() if data is not None and len(json.dumps(data)) <= _LARGEST_KEPT}


def write(model: SourceModel, plan: Plan, folder: Path) -> None:
    """Write the companions of `model` into `folder`, where the processor, if any, is saved already."""
    from transformers import Florence2ForConditionalGeneration

    config: Any = model.config
    config.dtype = plan.dtype
    config.architectures = [Florence2ForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    settings = generation_settings(model.options["config"]["text_config"])
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def build_processor(model: SourceModel, checkpoint: Checkpoint, options: Florence2Options) -> Processor | None:
    """The processor of `model`, None where there is no tokenizer. Raises VocabularyError when the tokenizer does not
    fit, ConfigurationError for image settings that cannot be, or that nothing tells."""
    source = vocabulary_source(checkpoint, options)
    if source is None:
        return None
    from transformers import Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from weightport.families.florence2.tokenizer import build_florence2_tokenizer, check_fit, read_florence2_vocabulary
    from weightport.tokenizers.provenance import florence2_provenance

    config: Any = model.config
    vocabulary = read_florence2_vocabulary(source)
    check_fit(vocabulary, model.options["rows"])
    tokenizer = build_florence2_tokenizer(
        vocabulary, config.image_token_id, config.text_config.max_position_embeddings
    )
    settings = image_settings(_stated_images(checkpoint, source), config.vision_config, str(checkpoint.path))
    try:
        image_processor = CLIPImageProcessorPil(**settings)
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigurationError(f"preprocessor_config.json cannot be used: {error}.") from error
    processor = Florence2Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        post_processor_config=post_processor_config(),
    )
    return Processor(processor, florence2_provenance(source))


def _stated_images(checkpoint: Checkpoint, source: str | Path) -> Any:
    """The image settings beside the weights, or where the tokenizer is from; None when neither has any."""
    folders = [checkpoint.folder, *([Path(source)] if Path(source).is_dir() else [])]
    for folder in folders:
        stated = read_companion(folder / PREPROCESSOR)
        if stated is not None:
            return stated
        # transformers 5 saves all settings of a processor in one file.
        whole = read_companion(folder / "processor_config.json")
        if isinstance(whole, Mapping) and whole.get("image_processor") is not None:
            return whole["image_processor"]
    return None
