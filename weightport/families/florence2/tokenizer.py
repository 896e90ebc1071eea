"""Florence-2's tokenizer: BART's byte-level BPE, 1024 task tokens, and one id that stands for image features.

The released folders do not name the task tokens (the remote code's processor adds them when it starts); forks saved by
`save_pretrained` do. Ids are written into the vocabulary itself, so that none depends on the order tokens are added
in.
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
from weightport.errors import VocabularyError
from weightport.panics import panics_as_errors

LOCATIONS = 1000
_PAIRS = ("cap", "ncap", "dcap", "grounding", "seg")
_LATER_PAIRS = ("region_cap", "region_to_desciption", "proposal", "poly")  # the original's spelling


def _pairs(*names: str) -> list[str]:
    return [token for name in names for token in (f"<{name}>", f"</{name}>")]


TASK_TOKENS = (
    *_pairs("od", "ocr"),
    *(f"<loc_{i}>" for i in range(LOCATIONS)),
    *_pairs(*_PAIRS),
    "<sep>",
    *_pairs(*_LATER_PAIRS),
    "<and>",
)
"""In the order in which the original's processor adds them, behind what the tokenizer has."""

IMAGE_TOKEN = "<image>"
FILLER = "madeupword"
"""BART's vocabulary is padded with entries of this name; no text gives them."""
# Bytes that no UTF-8 text has, as byte-level BPE writes them: C0, C1, F5 to FF.
IMPOSSIBLE_BYTES = tuple(
    chr(byte) for byte in (0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xFA, 0xF9, 0xF8, 0xF7, 0xF6, 0xF5, 0xC1, 0xC0)
)
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
            "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
_EXPECTED = "Expected tokenizer.json, or vocab.json with merges.txt, as Florence-2's repositories have them."


@dataclass(frozen=True)
class Florence2Vocabulary:
    """A tokenizer.json as data, its task tokens included. `added`: the task tokens that the files did not name."""

    source: str
    data: Mapping[str, Any]
    added: tuple[str, ...]

    @property
    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return {**self.data["model"]["vocab"], **{each["content"]: each["id"] for each in self.data["added_tokens"]}}


def read_florence2_vocabulary(source: str | Path) -> Florence2Vocabulary:
    """Read a folder's tokenizer, or that of a Hub repository. Raises VocabularyError on anything missing or
    malformed."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    if (folder / "tokenizer.json").is_file():
        data = _read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        data = _assembled(_read_json(folder / "vocab.json"), _read_text(folder / "merges.txt"))
    else:
        raise VocabularyError(f"{source} holds no tokenizer. {_EXPECTED}")
    model = data.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping) or "merges" not in model:
        raise VocabularyError(f"{folder / 'tokenizer.json'} is not a byte-pair tokenizer. {_EXPECTED}")
    added = data.get("added_tokens") or []
    well_formed = isinstance(added, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("content"), str) and type(each.get("id")) is int
        for each in added
    )
    if not well_formed or not _has_ids(model["vocab"]):
        raise VocabularyError(f"{folder / 'tokenizer.json'} is malformed: every token should have an integer id.")
    extra = _read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    if not _has_ids(extra):
        raise VocabularyError(f"{folder / 'added_tokens.json'} is malformed: every token should have an integer id.")
    return _with_task_tokens(str(source), data, extra)


def reusable_token(vocabulary: Florence2Vocabulary, rows: int) -> tuple[int, str | None]:
    """An id of the embedding that no text gives, and the token it has: the image placeholder that changes no logit.

    In this order: a token called <image>, a filler of BART's vocabulary, a row without token, a byte that UTF-8 does
    not have. Raises VocabularyError when there is none.
    """
    ids = vocabulary.ids
    if IMAGE_TOKEN in ids:
        return ids[IMAGE_TOKEN], IMAGE_TOKEN
    fillers = sorted(token for token in ids if token.startswith(FILLER))
    if fillers:
        return ids[fillers[0]], fillers[0]
    free = sorted(set(range(rows)) - set(ids.values()))
    if free:
        return free[0], None
    token = next((token for token in IMPOSSIBLE_BYTES if token in ids), None)
    if token is None:
        raise VocabularyError(
            f"The tokenizer in {vocabulary.source} has no unused id that could stand for the image. Pass "
            "--image-token append to add one, at the price of a small change in every probability."
        )
    return ids[token], token


def check_fit(vocabulary: Florence2Vocabulary, rows: int) -> None:
    """Raise VocabularyError when a token's id lies outside the embedding."""
    ids = vocabulary.ids
    outside = sorted((index, token) for token, index in ids.items() if index >= rows)
    if outside:
        index, token = outside[0]
        raise VocabularyError(
            f"The tokenizer in {vocabulary.source} has {max(ids.values()) + 1} tokens, the checkpoint's embedding "
            f"{rows} rows: {len(outside)} tokens would have none (the first is {token!r}, id {index}).\n"
            "  The tokenizer belongs to another checkpoint; put the right one beside the weights or pass --vocab."
        )


def build_florence2_tokenizer(
    vocabulary: Florence2Vocabulary, image_token_id: int, model_max_length: int
) -> PreTrainedTokenizerFast:
    """The fast tokenizer: the original's ids, and <image> as the token of `image_token_id`."""
    data = json.loads(json.dumps(vocabulary.data))
    vocab = data["model"]["vocab"]
    previous = next((token for token, index in vocabulary.ids.items() if index == image_token_id), None)
    if previous not in (None, IMAGE_TOKEN):
        vocab.pop(previous, None)
        data["added_tokens"] = [each for each in data["added_tokens"] if each["content"] != previous]
    if previous != IMAGE_TOKEN:
        data["added_tokens"].append(_special(IMAGE_TOKEN, image_token_id))
    data["added_tokens"].sort(key=lambda each: each["id"])
    for each in data["added_tokens"]:
        vocab[each["content"]] = each["id"]
    try:
        with panics_as_errors():
            backend = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises no type of its own
        raise VocabularyError(f"The tokenizer in {vocabulary.source} cannot be built: {error}.") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **_SPECIAL,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def original_tokenizer(
    data: Mapping[str, Any], replaced: str | None, image_id: int, added: list[str]
) -> dict[str, Any]:
    """A converted directory's tokenizer.json as the original's: without <image>, and without the task tokens that the
    original's files did not name. `replaced` is the token that <image> took the place of."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    gone = {*added, *([IMAGE_TOKEN] if replaced != IMAGE_TOKEN else [])}
    result["added_tokens"] = [each for each in result["added_tokens"] if each["content"] not in gone]
    kept = {each["content"] for each in result["added_tokens"]}
    vocab = result["model"]["vocab"]
    if replaced is not None:
        vocab[replaced] = image_id
    # Ids of added tokens follow from their order in the original's files.
    result["model"]["vocab"] = {
        token: index
        for token, index in sorted(vocab.items(), key=lambda item: item[1])
        if token not in gone and (token not in kept or token in _SPECIAL.values())
    }
    return result


def _with_task_tokens(source: str, data: Mapping[str, Any], extra: Mapping[str, Any]) -> Florence2Vocabulary:
    added = [dict(each) for each in data.get("added_tokens") or ()]
    ids: dict[str, int] = dict(data["model"]["vocab"])
    ids |= {each["content"]: each["id"] for each in added}
    for token, index in sorted(extra.items(), key=lambda item: item[1]):
        if token in ids:
            if ids[token] != index:
                raise VocabularyError(
                    f"{source}: added_tokens.json gives {token} the id {index}, tokenizer.json {ids[token]}."
                )
            continue
        ids[token] = index
        added.append(_special(token, index) if token in TASK_TOKENS else _plain(token, index))
    if missing := [token for token in set(_SPECIAL.values()) - {"<mask>", "<unk>"} if token not in ids]:
        raise VocabularyError(f"The tokenizer in {source} lacks {', '.join(sorted(missing))}; it is not Florence-2's.")
    absent = tuple(token for token in TASK_TOKENS if token not in ids)
    free = max(ids.values()) + 1
    added += [_special(token, free + place) for place, token in enumerate(absent)]
    used = [*ids.values(), *range(free, free + len(absent))]
    if len(set(used)) != len(used):
        raise VocabularyError(f"The tokenizer in {source} gives two tokens the same id.")
    return Florence2Vocabulary(source, {**data, "added_tokens": added}, absent)


def _special(token: str, index: int) -> dict[str, Any]:
    return {**_plain(token, index), "normalized": False, "special": True}


def _plain(token: str, index: int) -> dict[str, Any]:
    return {
        "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
        "special": False,
    }  # fmt: skip


def _assembled(vocab: Any, merges: str) -> dict[str, Any]:
    """tokenizer.json of a vocab.json and a merges.txt, as BART's fast tokenizer puts them together."""
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    specials = [_special(token, vocab[token]) for token in ("<s>", "<pad>", "</s>", "<unk>") if token in vocab]
    if "<mask>" in vocab:
        specials.append({**_special("<mask>", vocab["<mask>"]), "lstrip": True})
    byte_level = {"type": "ByteLevel", "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**each, "normalized": True} for each in specials],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": {
            "type": "RobertaProcessing", "sep": ["</s>", vocab.get("</s>", 2)], "cls": ["<s>", vocab.get("<s>", 0)],
            "trim_offsets": True, "add_prefix_space": False,
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocab, "merges": lines,
        },
    }  # fmt: skip


def _has_ids(tokens: Mapping[str, Any]) -> bool:
    return all(type(index) is int for index in tokens.values())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{path} cannot be read: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise VocabularyError(f"{path} should hold a JSON object; found {type(data).__name__}.")
    return data


def _from_hub(name: str) -> Path:
    from huggingface_hub.errors import HFValidationError

    from weightport.hub import HUB_ERRORS, download, reason

    try:
        return download(name, "tokenizer.json").parent
    except HFValidationError as error:
        raise VocabularyError(f"{name} is neither a folder nor the name of a Hub repository. {_EXPECTED}") from error
    except HUB_ERRORS as error:
        raise VocabularyError(f"The tokenizer of {name} cannot be had from the Hub: {reason(error)}") from error
