"""PaliGemma's tokenizer from its sentencepiece model: the original's ids, with nothing fetched.

The original's file is Gemma's vocabulary with 1024 places and 128 masks behind it (`<loc0000>` … `<seg127>`); where
only Gemma's own file is at hand, the original appends them when it loads it, and so does this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightport.errors import MissingVocabularyError, VocabularyError
from weightport.hub import HUB_ERRORS, download, reason
from weightport.tokenizers.provenance import Provenance, of_file
from weightport.tokenizers.sentencepiece_model import (
    Algorithm,
    Piece,
    PieceType,
    SentencePieceModel,
    read_sentencepiece,
)

FILES = ("paligemma_tokenizer.model", "tokenizer.model")
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
IMAGE, MASK = "<image>", "<mask>"
PLACES = tuple(f"<loc{number:04}>" for number in range(1024))
MASKS = tuple(f"<seg{number:03}>" for number in range(128))
APPENDED = PLACES + MASKS


@dataclass(frozen=True)
class PaliGemmaVocabulary:
    """The pieces by id, those of places and masks last, and the file that they were read from."""

    model: SentencePieceModel
    provenance: Provenance

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.model.pieces


def vocabulary_file(folder: Path) -> Path | None:
    """The sentencepiece model that stands in a folder, None where none does."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read_vocabulary(source: str | Path) -> PaliGemmaVocabulary:
    """The vocabulary in a .model file, a folder that holds one, or a repository of the Hub. Raises VocabularyError."""
    path = Path(source)
    found = vocabulary_file(path) if path.is_dir() else path
    if found is None:
        raise VocabularyError(f"{path} holds no sentencepiece model ({' or '.join(FILES)}).")
    name = found.name
    if not found.exists():
        found, name = _from_hub(str(source)), str(source)
    model = read_sentencepiece(found)
    _check_settings(model)
    return PaliGemmaVocabulary(_with_appended(model), of_file(found, name))


def _from_hub(repository: str) -> Path:
    if repository.count("/") != 1 or repository.endswith(".model"):
        raise MissingVocabularyError(
            f"There is no vocabulary at {repository}. Expected a sentencepiece model file, a folder that holds "
            f"{' or '.join(FILES)}, or a Hub repository that has one."
        )
    try:
        return download(repository, FILES[1])
    except HUB_ERRORS as error:
        raise VocabularyError(
            f"There is no file or folder {repository} here, and the Hub's repository of that name gave no {FILES[1]}: "
            f"{reason(error)}"
        ) from error


def _check_settings(model: SentencePieceModel) -> None:
    wrong = [
        said
        for said, differs in {
            f"cuts text by {model.algorithm.name}, not BPE": model.algorithm != Algorithm.BPE,
            "does not fall back to bytes": not model.byte_fallback,
            "puts a space before every text": model.dummy_prefix,
            "trims spaces": model.trims,
            "maps characters to others": model.maps_characters,
            f"does not begin with {' '.join(SPECIAL)}": tuple(p.text for p in model.pieces[: len(SPECIAL)]) != SPECIAL,
        }.items()
        if differs
    ]
    if wrong:
        raise VocabularyError(f"{model.source} is not Gemma's vocabulary: it {', '.join(wrong)}.")


def _with_appended(model: SentencePieceModel) -> SentencePieceModel:
    """`model` with the pieces of places and masks. Raises VocabularyError where it has some of them, or elsewhere."""
    own = tuple(piece.text for piece in model.pieces)
    if own[-len(APPENDED) :] == APPENDED:
        return model
    if present := set(own) & set(APPENDED):
        raise VocabularyError(
            f"{model.source} has {len(present)} of the {len(APPENDED)} pieces {PLACES[0]} to {MASKS[-1]}, and not as "
            "its last ones in their order: their ids would be wrong."
        )
    added = tuple(Piece(text, 0.0, PieceType.USER_DEFINED) for text in APPENDED)
    return replace(model, pieces=model.pieces + added)


def check_fit(vocabulary: PaliGemmaVocabulary, rows: int) -> None:
    """Raise VocabularyError unless every row of the embedding is a piece's."""
    found = len(vocabulary.pieces)
    if found != rows:
        raise VocabularyError(
            f"{vocabulary.model.source} has {found} pieces, those of places and masks included; the model's embedding "
            f"has {rows} rows.\n  It belongs to another model: PaliGemma's is paligemma_tokenizer.model, or Gemma's "
            "(and Gemma 2's) tokenizer.model with 256000 pieces."
        )


def build_tokenizer(vocabulary: PaliGemmaVocabulary) -> Any:
    """GemmaTokenizer with the original's ids, and <image> as the first id behind them.

    Pieces that sentencepiece takes whole wherever they stand (runs of spaces and of line ends, tags, places) are
    matched in the normalized text, the longest first, as sentencepiece does.
    """
    from transformers import AddedToken, GemmaTokenizer

    ids = {piece.text: place for place, piece in enumerate(vocabulary.pieces)}
    # Annotated as strings there; tokenizers takes pairs.
    merges: Any = _merges(vocabulary.pieces, ids)
    tokenizer = GemmaTokenizer(
        vocab=ids,
        merges=merges,
        # Without one of its own, a mask token would take the id of <image>.
        mask_token=MASK if MASK in ids else SPECIAL[-1],
    )
    whole = [piece.text for piece in vocabulary.pieces if piece.type == PieceType.USER_DEFINED and piece.text != MASK]
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in whole])
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(IMAGE, normalized=False, special=True)]})
    return tokenizer


def _merges(pieces: tuple[Piece, ...], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make another one, in the order in which BPE joins them: by the score of what they make."""
    normal = {piece.text: piece.score for piece in pieces if piece.type == PieceType.NORMAL}
    found = [
        (-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]
