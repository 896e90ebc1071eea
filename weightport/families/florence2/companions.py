"""What stands beside the weights of a converted Florence-2: configuration, generation settings, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightport.checkpoints import Checkpoint
from weightport.checkpoints.json_text import parse_json
from weightport.converters.family import Options, SourceModel
from weightport.converters.plan import Plan, main_dtype
from weightport.errors import CheckpointError, ConfigurationError
from weightport.families.florence2.generation_config import generation_settings
from weightport.families.florence2.grounding import post_processor_config
from weightport.families.florence2.images import image_settings

NO_VOCABULARY = "none"
_LARGEST_KEPT = 20_000  # characters; a fork's tokenizer_config.json lists its 1024 tokens a second time


def companion(checkpoint: Checkpoint, name: str) -> Any:
    """The JSON file `name` beside the weights, None when there is none. Raises CheckpointError for a malformed one."""
    path = checkpoint.folder / name
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} should be a JSON file, but cannot be read as one ({error}).") from error


def vocabulary_source(checkpoint: Checkpoint, options: Options) -> str | Path | None:
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


def write(model: SourceModel, checkpoint: Checkpoint, plan: Plan, folder: Path, options: Options) -> None:
    """Write every companion of `model` into `folder`."""
    from transformers import Florence2ForConditionalGeneration

    config: Any = model.config
    config.dtype = main_dtype(plan)
    config.architectures = [Florence2ForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    settings = generation_settings(model.options["config"]["text_config"])
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    source = vocabulary_source(checkpoint, options)
    if source is not None:
        _write_processor(source, model, checkpoint, folder)


def _write_processor(source: str | Path, model: SourceModel, checkpoint: Checkpoint, folder: Path) -> None:
    from transformers import Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from weightport.families.florence2.tokenizer import build_florence2_tokenizer, check_fit, read_florence2_vocabulary

    config: Any = model.config
    vocabulary = read_florence2_vocabulary(source)
    check_fit(vocabulary, model.options["rows"])
    tokenizer = build_florence2_tokenizer(
        vocabulary, config.image_token_id, config.text_config.max_position_embeddings
    )
    settings = image_settings(companion(checkpoint, "preprocessor_config.json"), config.vision_config)
    try:
        image_processor = CLIPImageProcessorPil(**settings)
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigurationError(f"preprocessor_config.json cannot be used: {error}.") from error
    Florence2Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        post_processor_config=post_processor_config(),
    ).save_pretrained(folder)
