"""BLIP-2's tokenizers as LAVIS sets them up, and the ids that a configuration takes from them.

OPT's is byte-level BPE with `</s>` before every text; answers end at a line end, not at `</s>`. Flan-T5's ends texts
with `</s>`. The Q-Former's is BERT's with `[DEC]` as one more token. Blip2Processor adds `<image>` behind all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightport.checkpoints.json_text import parse_json
from weightport.errors import MissingVocabularyError, VocabularyError
from weightport.families.blip2.layouts import Kind
from weightport.hub import HUB_ERRORS, download_folder, reason
from weightport.panics import panics_as_errors
from weightport.tokenizers.provenance import Provenance, of_folder

DECODER_START = "[DEC]"
FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model", "vocab.txt",
)  # fmt: skip
LINE_END = "\n"
OWN = "the folder of the model itself"


@dataclass(frozen=True)
class SpecialIds:
    """Ids that the configuration holds. `end` is where an answer ends, `image` stands for a picture's vectors."""

    image: int
    bos: int
    end: int
    pad: int


RELEASED: Mapping[tuple[Kind, int], SpecialIds] = {
    ("opt", 50272): SpecialIds(image=50265, bos=2, end=50118, pad=1),
    ("t5", 32128): SpecialIds(image=32100, bos=1, end=1, pad=0),
    ("itm", 30523): SpecialIds(image=30523, bos=30522, end=102, pad=0),
}
"""Of the releases, by kind and rows of the embedding, where a model is written without a tokenizer."""


def folder_of(source: str, flag: str) -> Path:
    """The folder `source`, or the Hub repository of that name in the cache. Raises VocabularyError."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or source.count("/") > 1:
        raise MissingVocabularyError(f"{flag} {source}: expected a folder, or a Hub id.")
    try:
        return download_folder(source, FILES)
    except HUB_ERRORS as error:
        raise VocabularyError(
            f"{flag}: there is no folder {source} here, and the Hub gave no repository of that name: {reason(error)}"
        ) from error


def configuration_in(folder: Path) -> Mapping[str, Any]:
    """The config.json of a folder, empty where it has none. Raises VocabularyError for a malformed one."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{path} cannot be read: {error}.") from error
    return found if isinstance(found, Mapping) else {}


def load_tokenizer(kind: Kind, folder: Path) -> Any:
    """The tokenizer in `folder` as LAVIS sets it up. Raises VocabularyError for what is none of its kind."""
    from transformers import AutoTokenizer

    model_type = configuration_in(folder).get("model_type", "")
    if not isinstance(model_type, str):
        # AutoTokenizer would import every model of transformers to name them all.
        raise VocabularyError(f"{folder / 'config.json'}: model_type is {model_type!r:.80}, not the name of a model.")
    try:
        # OPT answers behind its prompt, so that padding stands before it.
        side = {"padding_side": "left"} if kind == "opt" else {}
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **side)
    except Exception as error:
        # tokenizers raises plain Exceptions, huggingface_hub its own for values of config.json.
        reason = (str(error) or repr(error)).splitlines()[0]
        raise VocabularyError(f"{folder} holds no tokenizer that can be read: {reason}") from error
    if kind == "itm":
        tokenizer.add_special_tokens({"bos_token": DECODER_START})
    if kind == "opt":
        _check_opt(tokenizer, folder)
    return tokenizer


def _check_opt(tokenizer: Any, folder: Path) -> None:
    start = tokenizer("").input_ids
    if start != [tokenizer.bos_token_id]:
        raise VocabularyError(
            f"{folder}: the tokenizer makes {start} of an empty text; OPT's puts {tokenizer.bos_token!r} before every "
            "text (add_bos_token in tokenizer_config.json)."
        )
    if len(tokenizer(LINE_END, add_special_tokens=False).input_ids) != 1:
        raise VocabularyError(f"{folder}: a line end, which ends OPT's captions, is not one token.")


def special_ids(kind: Kind, tokenizer: Any, rows: int, folder: Path) -> SpecialIds:
    """The ids of a tokenizer for an embedding of so many rows. Raises VocabularyError where <image> has no row.

    No embedding grows: one more row than the language model has would tie Flan-T5's head to its embedding. The row of
    <image> is never used, but transformers looks it up."""
    image = len(tokenizer)
    if image > rows or (image == rows and kind != "itm"):
        raise VocabularyError(
            f"The tokenizer in {folder} has {image} tokens, and the embedding {rows} rows: there is none for "
            "<image>.\n  It belongs to another model."
        )
    if kind == "opt":
        end = tokenizer(LINE_END, add_special_tokens=False).input_ids[0]
        return SpecialIds(image, tokenizer.bos_token_id, end, tokenizer.pad_token_id)
    if kind == "t5":
        return SpecialIds(image, tokenizer.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return SpecialIds(image, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)


def provenance(folder: Path, name: str, *, own: bool) -> Provenance:
    """The files that a tokenizer was read of; `name` is what the user called the folder, `own` whether it is that of
    the model whose tokenizer it is."""
    found = of_folder(folder, FILES[1:], name)
    if not own:
        return found
    files = tuple(replace(file, origin=file.origin or OWN) for file in found.files)
    return replace(found, files=files)
