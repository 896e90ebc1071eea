"""The processor beside a model: what a family builds, and whether model and processor belong together.

Checked before anything is written: a processor that makes other pictures, other ids or another number of placeholders
than the model takes would fail, or answer nonsense, when the directory is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightport.errors import ConfigurationError, VocabularyError
from weightport.tokenizers.provenance import Provenance

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

SPECIAL_TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")


@dataclass(frozen=True)
class Processor:
    """A processor of transformers, not yet saved, and the vocabulary that its tokenizer was made of.

    `end` is the id at which the model's answers end, where that is not the tokenizer's own end of text."""

    processor: ProcessorMixin
    vocabulary: Provenance
    end: int | None = None


@dataclass(frozen=True)
class ImageUse:
    """What a model makes of a picture: `rows` × `columns` features, at most `limit` a side, `placeholders` of which
    stand in the prompt (0 where the model puts features before the text itself)."""

    rows: int
    columns: int
    limit: int
    placeholders: int


def image_sides(processor: ProcessorMixin) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that a processor makes. Raises ConfigurationError."""
    size = processor.image_processor.size
    sides = [size.get(side) for side in ("height", "width")]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ConfigurationError(f"The image processor's size is {dict(size)!r}; expected a height and a width.")
    return sides[0], sides[1]


def check_processor(
    processor: ProcessorMixin, config: PreTrainedConfig, use: ImageUse, end: int | None = None
) -> None:
    """Raise VocabularyError or ConfigurationError unless `processor` makes what the model of `config` takes.

    `use` is what the model makes of the processor's pictures, `end` a Processor's. Compared are ids with rows of the
    embedding, special tokens with their ids, pictures with the grid of positions, and placeholders with features and
    text positions.
    """
    text: Any = config.get_text_config()
    _check_ids(processor, config, text.vocab_size)
    _check_special_tokens(processor, config, text, end)
    height, width = image_sides(processor)
    pixels = f"Pictures of {height} × {width} pixels give {use.rows} × {use.columns} features"
    if not (0 < use.rows <= use.limit and 0 < use.columns <= use.limit):
        raise ConfigurationError(f"{pixels}; the model has positions for {use.limit} × {use.limit}.")
    if not use.placeholders:
        return
    stated = getattr(processor.image_processor, "image_seq_length", None)
    if stated not in (None, use.placeholders):
        raise ConfigurationError(
            f"{pixels}, {use.placeholders} vectors in all, but the processor writes {stated} placeholders."
        )
    needed = use.placeholders + len(processor.tokenizer("").input_ids)
    # A model of relative positions has no number of them.
    positions = getattr(text, "max_position_embeddings", needed)
    if needed > positions:
        raise ConfigurationError(f"{pixels}, {needed} positions with an empty prompt; the text model has {positions}.")


def _check_ids(processor: ProcessorMixin, config: PreTrainedConfig, rows: int) -> None:
    # A placeholder's row is never looked up: models may keep its id outside of their embedding.
    image = _image_id(processor)
    own = None if image is None or image != getattr(config, "image_token_id", None) else image
    ids = ((token, place) for token, place in processor.tokenizer.get_vocab().items() if place != own)
    token, last = max(ids, key=lambda item: item[1])
    if last >= rows:
        raise VocabularyError(
            f"The tokenizer gives ids up to {last} ({token!r}); the model's embedding has {rows} rows."
        )


def _image_id(processor: ProcessorMixin) -> int | None:
    """The id of the image's placeholder; some processors have the token only."""
    known: int | None = getattr(processor, "image_token_id", None)
    token = getattr(processor, "image_token", None)
    if known is not None or token is None:
        return known
    return int(processor.tokenizer.convert_tokens_to_ids(str(token)))


def _check_special_tokens(processor: ProcessorMixin, config: PreTrainedConfig, text: Any, end: int | None) -> None:
    given = {name: getattr(processor.tokenizer, name, None) for name in SPECIAL_TOKENS}
    if end is not None:
        given["eos_token_id"] = end
    pairs = [(name, given[name], getattr(text, name, None)) for name in SPECIAL_TOKENS]
    image = _image_id(processor)
    pairs.append(("image_token_id", image, getattr(config, "image_token_id", None) if image is not None else None))
    wrong = [
        f"{name} {given} ({processor.tokenizer.convert_ids_to_tokens(given)!r}), the model {wanted}"
        for name, given, wanted in pairs
        if given is not None and wanted is not None and given != wanted
    ]
    if wrong:
        raise VocabularyError(
            f"The tokenizer's special tokens are not the model's: the tokenizer has {'; '.join(wrong)}.\n"
            "  The vocabulary belongs to another checkpoint, or config.json was changed."
        )
