"""What stands beside the weights of a converted moondream2: configuration, generation settings, processor; and what is
read beside an original one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightport.checkpoints import Checkpoint
from weightport.checkpoints.json_text import parse_json
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan
from weightport.converters.portable import write_portable_code
from weightport.converters.processor import Processor
from weightport.errors import CheckpointError, VocabularyError
from weightport.families.moondream2.configuration import DEFAULTS_2025, stated_2025
from weightport.families.moondream2.options import MoondreamOptions
from weightport.families.moondream2.portable import AUTO_MAPS
from weightport.families.moondream2.revisions import NEW_TOKENIZER, Revision, revision_named

NO_VOCABULARY = "none"
CODE = ("moondream.py", "vision_encoder.py", "config.py")
"""Python files that tell revisions apart; they are read as text."""
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""JSON files that an export gives back as they were."""
_LARGEST_READ = 2_000_000  # characters

LANCZOS, BICUBIC = 1, 3
"""Pillow's numbers."""
RELEASED_IDS = {"bos": 50256, "eos": 50256}
NEW_IDS = {"bos": 0, "eos": 0, "answer": 3}
REASONING_IDS = {"thinking_id": 4, "coord_id": 5, "size_id": 6, "start_ground_points_id": 7, "end_ground_id": 9}
"""Of 2025-06-21, by the names of its code."""

_PLAIN = {"query": {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]}}
_PLAIN_CAPTIONS = {"short": [198, 198, 16438, 8305, 25], "normal": [198, 198, 24334, 1159, 25]}
_PLAIN_PLACES = {
    "detect": {"prefix": [198, 198, 47504, 25], "suffix": [628]},
    "point": {"prefix": [198, 198, 12727, 25], "suffix": [628]},
}
TEMPLATES: Mapping[str, Mapping[str, Any]] = {
    "2025-01-09": {**_PLAIN, "caption": _PLAIN_CAPTIONS, **_PLAIN_PLACES},
    "2025-03-27": {**_PLAIN, "caption": {**_PLAIN_CAPTIONS, "long": [198, 198, 14617, 8305, 25]}, **_PLAIN_PLACES},
    "2025-06-21": {
        "caption": {
            "short": [1, 32708, 2, 12492, 3],
            "normal": [1, 32708, 2, 6382, 3],
            "long": [1, 32708, 2, 4059, 3],
        },
        "query": {"prefix": [1, 15381, 2], "suffix": [3]},
        "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
        "point": {"prefix": [1, 2581, 2], "suffix": [3]},
    },
}
"""Ids before and after a prompt's text, of the original's dataclasses."""
_SAME_TEMPLATES = {"2024-late": "2025-01-09", "2025-04-14": "2025-03-27"}


@dataclass(frozen=True)
class Beside:
    """What stands beside the weights: config.json, and the Python files as text."""

    config: Mapping[str, Any]
    code: Mapping[str, str]


def read_beside(checkpoint: Checkpoint) -> Beside:
    """Raises CheckpointError for a config.json that is none."""
    folder = checkpoint.folder
    config = read_json(folder / "config.json")
    if config is not None and not isinstance(config, Mapping):
        raise CheckpointError(f"{folder / 'config.json'} should hold a JSON object.")
    return Beside(config or {}, {name: text for name in CODE if (text := _text(folder / name)) is not None})


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:_LARGEST_READ] if path.is_file() else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path) -> Any:
    """A JSON file, None when there is none. Raises CheckpointError for a malformed one."""
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} should be a JSON file, but cannot be read as one ({error}).") from error


def source_files(checkpoint: Checkpoint) -> dict[str, Any]:
    """The original's JSON files, by name, for the way back."""
    found = {name: read_json(checkpoint.folder / name) for name in FILES}
    return {name: data for name, data in found.items() if data is not None}


def vocabulary_source(
    checkpoint: Checkpoint, revision: Revision, options: MoondreamOptions
) -> tuple[str | Path | None, str | None]:
    """(where the tokenizer is read from, what to say of it). None where there is none, or none is wanted.

    Beside weights of 2025-06-21 stands the tokenizer of earlier revisions: what was named, or the Hub's right one, is
    used instead.
    """
    from weightport.families.moondream2.tokenizer import read_vocabulary

    if options.vocabulary == NO_VOCABULARY:
        return None, None
    if options.vocabulary is not None:
        return options.vocabulary, None
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        if not revision.own_tokenizer:
            return None, None
        return NEW_TOKENIZER, f"No tokenizer beside the weights: that of {NEW_TOKENIZER} was used."
    if revision.own_tokenizer and not read_vocabulary(folder).is_new:
        return NEW_TOKENIZER, (
            f"tokenizer.json beside the weights is stale: it is that of the revisions before {revision.name}. The "
            f"tokenizer of {NEW_TOKENIZER} was used; --vocab names another."
        )
    return folder, None


def has_new_tokens(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer beside the weights is that of 2025-06-21."""
    from weightport.families.moondream2.tokenizer import read_vocabulary

    try:
        return (checkpoint.folder / "tokenizer.json").is_file() and read_vocabulary(checkpoint.folder).is_new
    except VocabularyError:
        return False


def special_ids(revision: Revision, stated: Mapping[str, Any], end: int | None, rows: int) -> dict[str, int | None]:
    """The ids `bos`, `eos` and, in 2025-06-21, `answer`: what config.json states, else the revision's, or the
    tokenizer's end token `end`. None where the embedding has no row of a release's id."""
    own = stated_2025(stated)["tokenizer"] if revision.keys == "2025" else {}
    default = (
        dict(NEW_IDS) if revision.own_tokenizer else ({"bos": end, "eos": end} if end is not None else RELEASED_IDS)
    )
    ids = {name: own.get(f"{name}_id", value) for name, value in default.items()}
    return {name: value if value < rows else None for name, value in ids.items()}


def reasoning_ids(revision: Revision, stated: Mapping[str, Any], rows: int) -> dict[str, int] | None:
    """The ids of thoughts, by the names of REASONING_IDS; None where the revision has none, or the embedding no row of
    one."""
    if not revision.own_tokenizer:
        return None
    own = stated_2025(stated)["tokenizer"]
    ids = {name: own.get(name, value) for name, value in REASONING_IDS.items()}
    return ids if all(type(value) is int and 0 <= value < rows for value in ids.values()) else None


def reasoning_config(revision: Revision, stated: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """`reasoning_config` of the native configuration."""
    ids, query = reasoning_ids(revision, stated, rows), _stated_templates(revision, stated).get("query")
    if ids is None or not query:
        return None
    return {
        "coord_token_id": ids["coord_id"], "size_token_id": ids["size_id"], "answer_prefix": list(query["suffix"])
    }  # fmt: skip


def _stated_templates(revision: Revision, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Templates as the original has them; none where prompts are words."""
    if revision.merge != "tiles":
        return {}
    own = stated_2025(stated)["tokenizer"].get("templates")
    known = own or TEMPLATES[_SAME_TEMPLATES.get(revision.name, revision.name)]
    return {name: dict(value) for name, value in known.items() if value}


def templates_of(revision: Revision, stated: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """The prompts of a revision of 2025, as its code makes them; None where prompts are words."""
    if revision.merge != "tiles":
        return None
    templates = _stated_templates(revision, stated)
    if revision.own_tokenizer and "query" in templates:
        query, ids = templates["query"], reasoning_ids(revision, stated, rows)
        if ids is not None:
            templates["reason"] = {
                "prefix": query["prefix"], "suffix": [*query["suffix"], ids["thinking_id"]],
                "ground": [ids["start_ground_points_id"], ids["end_ground_id"]], "coord": ids["coord_id"],
            }  # fmt: skip
        # The original appends the suffix twice where it does not reason first.
        templates["query"] = {**query, "suffix": [*query["suffix"], *query["suffix"]]}
    return templates


def write(model: SourceModel, plan: Plan, folder: Path, *, portable: bool = False) -> None:
    """Write the companions of `model` into `folder`, where the processor, if any, is saved already. `portable`: the
    model's code too."""
    from weightport.modeling.moondream.modeling_moondream import MoondreamForConditionalGeneration

    config: Any = model.config
    config.dtype = plan.dtype
    config.architectures = [MoondreamForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    revision = revision_named(model.options["revision"])
    settings = generation_settings(config, revision, model.options["end_ids"])
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if portable:
        write_portable_code(folder, "weightport.modeling.moondream", AUTO_MAPS)


def generation_settings(config: Any, revision: Revision, end_ids: list[int]) -> dict[str, Any]:
    """What the original's own methods generate with: greedy in 2024, sampled in 2025. The placeholder of pictures is
    never generated."""
    settings: dict[str, Any] = {
        "bos_token_id": config.text_config.bos_token_id,
        "eos_token_id": end_ids if len(end_ids) > 1 else config.text_config.eos_token_id,
        "pad_token_id": config.text_config.eos_token_id,
        "max_new_tokens": revision.new_tokens,
        "do_sample": False,
    }
    if config.image_token_id < config.text_config.vocab_size:
        settings["suppress_tokens"] = [config.image_token_id]
    if revision.keys == "2025":
        settings |= {"do_sample": True, "temperature": 0.5, "top_p": 0.3, "top_k": 0}
    return {name: value for name, value in settings.items() if value is not None}


def build_processor(model: SourceModel, checkpoint: Checkpoint, options: MoondreamOptions) -> Processor | None:
    """The processor of `model`, None where there is no tokenizer. Raises VocabularyError when the tokenizer does not
    fit."""
    from weightport.families.moondream2.tokenizer import build_tokenizer, check_fit, read_vocabulary
    from weightport.modeling.moondream.image_processing_moondream import MoondreamImageProcessor
    from weightport.modeling.moondream.processing_moondream import MoondreamProcessor

    config: Any = model.config
    revision = revision_named(model.options["revision"])
    source, _ = vocabulary_source(checkpoint, revision, options)
    if source is None:
        return None
    vocabulary = read_vocabulary(source)
    check_fit(vocabulary, config.text_config.vocab_size)
    if revision.own_tokenizer and not vocabulary.is_new:
        raise VocabularyError(
            f"The tokenizer in {vocabulary.source} is that of the revisions before {revision.name}; this one's is "
            f"that of {NEW_TOKENIZER}.\n  Pass --vocab with its tokenizer.json."
        )
    side = config.vision_config.image_size
    stated = model.options["files"].get("config.json") or {}
    images = MoondreamImageProcessor(
        size={"height": side, "width": side},
        views=revision.merge,
        resample=LANCZOS if revision.merge == "tiles" else BICUBIC,
        max_tiles=stated_2025(stated)["vision"].get("max_crops", DEFAULTS_2025["vision"]["max_crops"]),
        patch_size=config.vision_config.patch_size,
        overlap_margin=config.overlap_margin,
        normalize_dtype=revision.normalize_dtype,
        image_seq_length=config.image_seq_length,
    )
    processor = MoondreamProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(vocabulary, config.image_token_id, config.text_config.max_position_embeddings),
        templates=templates_of(revision, stated, config.text_config.vocab_size),
        question_space=revision.question_space,
        image_texts=revision.image_texts,
        answer_space=revision.answer_space,
        end_text=revision.end_text,
        clean_spaces=revision.keys == "2024",
        caption_settings=dict(revision.caption_settings) if revision.caption_settings else None,
    )
    return Processor(processor, vocabulary.provenance)
