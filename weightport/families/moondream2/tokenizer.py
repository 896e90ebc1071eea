"""moondream2's tokenizers: CodeGen's (GPT-2 with tokens of white space) up to 2025-04-14, starmie's of 2025-06-21.

Ids come from the files alone: the tokens of white space differ in no release, but a fine-tune may have more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from weightport.checkpoints.json_text import parse_json
from weightport.errors import MissingVocabularyError, VocabularyError
from weightport.hub import HUB_ERRORS, download, reason
from weightport.panics import panics_as_errors
from weightport.tokenizers.provenance import Provenance, of_file

IMAGE_TOKEN = "<image>"
END = "<|endoftext|>"
NEW_TOKEN = "<|md_reserved_0|>"
"""A token that only the tokenizer of 2025-06-21 has."""
FILE = "tokenizer.json"
_EXPECTED = (
    f"Expected {FILE}, or vocab.json with merges.txt and added_tokens.json, as moondream2's repositories have them."
)


@dataclass(frozen=True)
class MoondreamVocabulary:
    """A tokenizer.json as data, added tokens included, and the file that it was read from."""

    source: str
    data: Mapping[str, Any]
    provenance: Provenance

    @property
    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return {**self.data["model"]["vocab"], **{each["content"]: each["id"] for each in self.data["added_tokens"]}}

    @property
    def is_new(self) -> bool:
        """Whether it is that of 2025-06-21."""
        return NEW_TOKEN in self.ids


def read_vocabulary(source: str | Path) -> MoondreamVocabulary:
    """The tokenizer in a tokenizer.json, a folder or a repository of the Hub. Raises VocabularyError."""
    path = Path(source)
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        return _assembled(path)
    name = file.name
    if not file.is_file():
        file, name = _from_hub(str(source)), str(source)
    data = _read_json(file)
    model = data.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping) or "merges" not in model:
        raise VocabularyError(f"{file} is not a byte-pair tokenizer. {_EXPECTED}")
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(each, Mapping) and isinstance(each.get("content"), str) and type(each.get("id")) is int
        for each in added
    ):
        raise VocabularyError(f"{file} is malformed: every added token should have an integer id.")
    if not all(type(index) is int for index in model["vocab"].values()):
        raise VocabularyError(f"{file} is malformed: every token should have an integer id.")
    return _checked(MoondreamVocabulary(str(source), {**data, "added_tokens": list(added)}, of_file(file, name)))


def _from_hub(repository: str) -> Path:
    if repository.count("/") != 1 or repository.endswith(".json"):
        raise MissingVocabularyError(f"There is no tokenizer at {repository}. {_EXPECTED}")
    try:
        return download(repository, FILE)
    except HUB_ERRORS as error:
        raise VocabularyError(
            f"There is no file or folder {repository} here, and the Hub's repository of that name gave no {FILE}: "
            f"{reason(error)}"
        ) from error


def _assembled(folder: Path) -> MoondreamVocabulary:
    """The fast tokenizer of a slow one's files."""
    parts = [folder / name for name in ("vocab.json", "merges.txt")]
    if not all(part.is_file() for part in parts):
        raise VocabularyError(f"{folder} holds no tokenizer. {_EXPECTED}")
    vocab = _read_json(parts[0])
    try:
        lines = parts[1].read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{parts[1]} cannot be read: {error}.") from error
    beside = folder / "added_tokens.json"
    extra = _read_json(beside) if beside.is_file() else {}
    if not all(type(index) is int for index in (*vocab.values(), *extra.values())):
        raise VocabularyError(f"{folder}: every token should have an integer id.")
    added = {**({END: vocab[END]} if END in vocab else {}), **extra}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, index, special=token == END) for token, index in added.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocab,
            "merges": [line for line in lines if line and not line.startswith("#version")],
        },
    }  # fmt: skip
    return _checked(MoondreamVocabulary(str(folder), data, of_file(parts[0], folder.name)))


def _added(token: str, index: int, *, special: bool) -> dict[str, Any]:
    return {
        "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": not special, "special": special,
    }  # fmt: skip


def _checked(vocabulary: MoondreamVocabulary) -> MoondreamVocabulary:
    ids = vocabulary.ids
    if END not in ids:
        raise VocabularyError(f"The tokenizer in {vocabulary.source} lacks {END}; it is not moondream2's.")
    if len(set(ids.values())) != len(ids):
        raise VocabularyError(f"The tokenizer in {vocabulary.source} gives two tokens the same id.")
    return vocabulary


def check_fit(vocabulary: MoondreamVocabulary, rows: int) -> None:
    """Raise VocabularyError when a token's id lies outside the embedding."""
    last, token = max((index, token) for token, index in vocabulary.ids.items() if token != IMAGE_TOKEN)
    if last >= rows:
        raise VocabularyError(
            f"The tokenizer in {vocabulary.source} gives ids up to {last} ({token!r}); the model's embedding has "
            f"{rows} rows.\n  It belongs to another checkpoint; put the right one beside the weights or pass --vocab."
        )


def image_token_id(vocabulary: MoondreamVocabulary) -> int:
    """The id of `<image>`: its own, or the first behind all tokens. Released embeddings have unused rows there."""
    ids = vocabulary.ids
    return ids.get(IMAGE_TOKEN, max(ids.values()) + 1)


def build_tokenizer(vocabulary: MoondreamVocabulary, image_id: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer: the files' ids, and `<image>` behind them; padded on the left with the end token, as batches
    that generate need it."""
    data = json.loads(json.dumps(vocabulary.data))
    if IMAGE_TOKEN not in vocabulary.ids:
        data["added_tokens"].append(_added(IMAGE_TOKEN, image_id, special=True))
    data["added_tokens"].sort(key=lambda each: each["id"])
    data["truncation"] = data["padding"] = None
    try:
        with panics_as_errors():
            backend = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises no type of its own
        raise VocabularyError(f"The tokenizer in {vocabulary.source} cannot be built: {error}.") from error
    found = backend.token_to_id(IMAGE_TOKEN)
    if found != image_id:
        raise VocabularyError(
            f"The tokenizer in {vocabulary.source} has gaps in its ids: {IMAGE_TOKEN} is {found}, not {image_id}."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def original_tokenizer(data: Mapping[str, Any], added: bool) -> dict[str, Any]:
    """A converted directory's tokenizer.json as the original's: without `<image>` where the conversion `added` it."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    if added:
        result["added_tokens"] = [each for each in result["added_tokens"] if each["content"] != IMAGE_TOKEN]
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise VocabularyError(f"{path} should hold a JSON object; found {type(data).__name__}.")
    return data
