"""What stands beside the weights of a converted BLIP-2: configuration, generation settings, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightport.checkpoints.sources import Sources
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan
from weightport.converters.portable import entries_for, write_portable_code
from weightport.converters.processor import Processor
from weightport.families.blip2.layouts import Kind
from weightport.families.blip2.options import NO_VOCABULARY, Blip2Options
from weightport.families.blip2.portable import AUTO_MAPS, CODE
from weightport.families.blip2.sources import LLM
from weightport.families.blip2.tokenizers import folder_of, load_tokenizer, provenance

NEW_TOKENS = 30
"""Of a caption, where nobody says: LAVIS's own default."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""A chat's prompt is its text; the processor itself writes the image's places before it."""


def architecture(config: Any) -> Any:
    """The class of a configuration: transformers' own, or ours of our configuration."""
    from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

    from weightport.modeling.blip2_lavis import modeling_blip2_lavis as own

    retrieves = config.qformer_config.use_qformer_text_input
    if config.model_type == own.Blip2LavisConfig.model_type:
        return own.Blip2LavisForImageTextRetrieval if retrieves else own.Blip2LavisForConditionalGeneration
    return Blip2ForImageTextRetrieval if retrieves else Blip2ForConditionalGeneration


def vocabulary_folder(kind: Kind, sources: Sources, options: Blip2Options) -> tuple[Path, str] | None:
    """(the folder of the tokenizer, what the user called it); None where the model is written without one. Raises
    VocabularyError."""
    if options.vocabulary == NO_VOCABULARY:
        return None
    if options.vocabulary is not None:
        return folder_of(options.vocabulary, "--vocab"), Path(options.vocabulary).name
    if kind == "itm":
        if options.qformer_tokenizer is None:
            from weightport.errors import MissingVocabularyError

            raise MissingVocabularyError(
                "A stage-1 checkpoint has no tokenizer: give the folder of bert-base-uncased with "
                "--qformer-tokenizer, or --vocab none to write the model without a processor."
            )
        return folder_of(options.qformer_tokenizer, "--qformer-tokenizer"), Path(options.qformer_tokenizer).name
    return sources[LLM].folder, sources[LLM].path.name


def build_processor(kind: Kind, model: SourceModel, sources: Sources, options: Blip2Options) -> Processor | None:
    """The processor of `model`, None where none is asked for. Raises VocabularyError."""
    found = vocabulary_folder(kind, sources, options)
    if found is None:
        return None
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder, name = found
    config: Any = model.config
    side = config.vision_config.image_size
    processor: Any = Blip2Processor(
        BlipImageProcessorPil(size={"height": side, "width": side}),
        load_tokenizer(kind, folder),
        num_query_tokens=config.num_query_tokens,
    )
    processor.chat_template = CHAT_TEMPLATE
    own = options.vocabulary is None
    return Processor(processor, provenance(folder, name, own=own), end=config.text_config.eos_token_id)


def write(kind: Kind, model: SourceModel, plan: Plan, folder: Path, *, portable: bool = False) -> None:
    """Write the companions of `model` into `folder`, where the processor, if any, is saved already. `portable`: the
    model's code too."""
    config: Any = model.config
    config.dtype = plan.dtype
    config.architectures = [architecture(config).__name__]
    config.save_pretrained(folder)
    if kind == "t5":
        _say_untied(folder / "config.json")
    if portable:
        write_portable_code(folder, CODE, entries_for({"architectures": config.architectures}, AUTO_MAPS))
    if kind != "itm":
        _write_generation_settings(kind, config, folder)


def _write_generation_settings(kind: Kind, config: Any, folder: Path) -> None:
    text = config.text_config
    settings = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        **({"decoder_start_token_id": text.pad_token_id} if kind == "t5" else {}),
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _say_untied(path: Path) -> None:
    """Flan-T5's head is not its embedding, as its own configuration says. transformers 5 reads that and writes the
    opposite, by which transformers 4 would overwrite one with the other."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["text_config"]["tie_word_embeddings"] = False
    content["text_config"].pop("scale_decoder_outputs", None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
