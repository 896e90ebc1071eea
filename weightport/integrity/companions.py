"""Tokenizer and processor against the model: ids with rows of the embedding, pictures with the grid of positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.converters.processor import check_processor, image_sides
from weightport.errors import WeightportError
from weightport.integrity.findings import Finding, Severity, unchecked, wrong
from weightport.integrity.structure import Loaded, VerifiedFamily
from weightport.panics import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def check_companions(
    directory: Path, loaded: Loaded, family: VerifiedFamily | None
) -> tuple[list[str], list[Finding]]:
    """(what was compared, in words; what is wrong or could not be compared)."""
    names = {path.name for path in directory.iterdir()}
    found, findings = _tokenizer(directory, loaded) if names & set(TOKENIZERS) else ([], [_absent("tokenizer")])
    if any(each.severity is Severity.WRONG for each in findings):
        # A processor holds the tokenizer, and would only say so again.
        return found, findings
    if names & set(PROCESSORS):
        more, wrongs = _processor(directory, loaded, family)
    else:
        more, wrongs = [], [_absent("processor")] if hasattr(loaded.model.config, "vision_config") else []
    return [*found, *more], [*findings, *wrongs]


def _absent(what: str) -> Finding:
    return unchecked(what, "the directory has none")


def _tokenizer(directory: Path, loaded: Loaded) -> tuple[list[str], list[Finding]]:
    from transformers import AutoTokenizer

    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    except Exception as error:
        # Parsers in other languages raise what they like.
        return [], [_unread("tokenizer", directory, error)]
    rows = _rows(loaded)
    if rows is None or not vocabulary:
        return [], [unchecked("tokenizer", "the model has no token embedding of its own")]
    # A placeholder's row is never looked up: models may keep its id outside of their embedding.
    placeholder = _placeholder(loaded.model.config)
    token, last = max(((t, i) for t, i in vocabulary.items() if i != placeholder), key=lambda item: item[1])
    if last >= rows:
        text = f"gives ids up to {last} ({token!r}), the embedding has {rows} rows"
        return [], [wrong("tokenizer", text)]
    return [f"tokenizer: {len(vocabulary):,} tokens for {rows:,} rows"], []


def _processor(directory: Path, loaded: Loaded, family: VerifiedFamily | None) -> tuple[list[str], list[Finding]]:
    from transformers import AutoProcessor
    from transformers.processing_utils import ProcessorMixin

    try:
        with panics_as_errors():
            processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        return [], [_unread("processor", directory, error)]
    config: Any = loaded.model.config
    if not isinstance(processor, ProcessorMixin) or not hasattr(config, "vision_config"):
        return [], [unchecked("processor", "it is none of text and pictures")]
    findings = [
        wrong("processor", f"has {name} {mine!r}, the model {theirs!r}")
        for name, mine, theirs in _numbers(processor, config)
        if mine is not None and theirs is not None and mine != theirs
    ]
    if family is None:
        return (["processor: image token and number of image vectors"] if not findings else []), findings
    try:
        sides = image_sides(processor)
        use = family.conversion.image_use(config, *sides)
        # Where answers end is the model's own; the token has to exist.
        check_processor(processor, config, use, _end(config))
    except WeightportError as error:
        return [], [*findings, wrong("processor", " ".join(str(error).split()))]
    height, width = sides
    text = f"processor: {height} × {width} pixels give {use.rows} × {use.columns} features"
    return [text], findings


def _numbers(processor: Any, config: PreTrainedConfig) -> list[tuple[str, object, object]]:
    """(name, the processor's, the model's) of what both state."""
    token, own = getattr(processor, "image_token", None), getattr(processor, "image_token_id", None)
    if own is None and token is not None:
        own = processor.tokenizer.convert_tokens_to_ids(str(token))
    queries = "num_query_tokens"
    images = getattr(processor, "image_processor", None)
    return [
        ("image_token_id", own, _placeholder(config)),
        (queries, getattr(processor, queries, None), getattr(config, queries, None)),
        (
            "image_seq_length",
            getattr(images, "image_seq_length", None),
            getattr(getattr(config, "vision_config", None), "num_image_tokens", None),
        ),
    ]


def _placeholder(config: Any) -> int | None:
    known = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((each for each in known if each is not None), None)


def _end(config: Any) -> int | None:
    end = getattr(config.get_text_config(), "eos_token_id", None)
    return end if isinstance(end, int) else None


def _rows(loaded: Loaded) -> int | None:
    """Rows of the token embedding."""
    name = loaded.names.embedding
    if name is not None:
        return loaded.names.shapes[name][0]
    size = getattr(loaded.model.config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _unread(what: str, directory: Path, error: Exception) -> Finding:
    text = " ".join(str(error).replace(f"{directory}/", "").split())
    return wrong(what, f"cannot be loaded ({type(error).__name__}: {text[:200]})")
