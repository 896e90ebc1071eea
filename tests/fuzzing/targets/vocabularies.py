"""Readers of vocabularies, held against json, protobuf and plain lines."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.targets.changes import change
from fuzzing.targets.golden_sources import GOLDEN
from weightport.families.blip2.tokenizers import load_tokenizer
from weightport.families.florence2.tokenizer import read_florence2_vocabulary
from weightport.families.moondream2.tokenizer import read_vocabulary as read_moondream2
from weightport.families.paligemma2.tokenizer import read_vocabulary as read_paligemma2
from weightport.tokenizers.bpe import build_bpe
from weightport.tokenizers.sentencepiece_model import read_sentencepiece
from weightport.tokenizers.sources import ChineseVocabulary, read_ofa_vocabulary
from weightport.tokenizers.wordpiece import build_wordpiece

TEXT = "a cat 图片, \u2028 <image> 12"


def _companions(case: str, *names: str) -> Case:
    folder = GOLDEN / "cases" / case / "companions"
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.name in names}


def _ofa_seeds(folder: Path) -> list[Case]:
    chinese = _companions("ofa/cn-tiny", "dict.txt", "vocab.txt")
    english = _companions("ofa/en-tiny-args", "dict.txt", "encoder.json", "vocab.bpe")
    encoder = json.loads(english["encoder.json"])
    rows = ["<s>", "<pad>", "</s>", "<unk>", *encoder]
    ported = {
        "vocab.json": json.dumps({token: row for row, token in enumerate(rows)}).encode(),
        "merges.txt": english["vocab.bpe"],
        "added_tokens.json": json.dumps({"<code_0>": len(rows), "<bin_0>": len(rows) + 1}).encode(),
    }
    return [chinese, {"vocab.txt": chinese["vocab.txt"]}, {"dict.txt": chinese["dict.txt"]}, english, ported]


def _read_ofa(folder: Path) -> Any:
    vocabulary = read_ofa_vocabulary(folder)
    build = build_wordpiece if isinstance(vocabulary, ChineseVocabulary) else build_bpe
    build(vocabulary, vocabulary.dictionary).encode(TEXT)
    return vocabulary


def _as_lines(folder: Path, vocabulary: Any) -> bool:
    """fairseq's own way with a dict.txt: a symbol is what stands before the last space."""
    path = folder / "dict.txt"
    if not path.is_file() or b"#" in path.read_bytes():
        return False
    lines = path.read_text("utf-8").split("\n")
    theirs = [line.rstrip().rsplit(" ", 1)[0] for line in lines if line]
    ours = list(vocabulary.dictionary.symbols[4:])
    if all(line.rstrip() for line in lines[:-1]) and ours != theirs:
        raise MismatchError(f"symbols: {len(ours)} here and {len(theirs)} there")
    return True


def _sentencepiece_seeds(folder: Path) -> list[Case]:
    """Small models: each message's fields are what sentencepiece's own have."""
    return [{"in.model": _model(algorithm=2)}, {"in.model": _model(algorithm=1, charsmap=b"\1\2")}]


def _model(algorithm: int, charsmap: bytes = b"") -> bytes:
    def message(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(text: str, score: float, kind: int | None = None) -> bytes:
        data = message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        return message(1, data + (b"\x18" + bytes([kind]) if kind else b""))

    special = [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2), ("<mask>", 4)]
    pieces = [piece(text, 0.0, kind) for text, kind in special]
    pieces += [piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(4)]
    pieces += [piece(text, -float(at)) for at, text in enumerate(("ab", "a", "b", "▁", "图"))]
    trainer = message(2, b"\x18" + bytes([algorithm]) + b"\xc0\x02\x01" + b"\x98\x02\x01")
    normalizer = message(3, message(1, b"identity") + (message(2, charsmap) if charsmap else b"") + b"\x18\0\x20\0")
    return b"".join(pieces) + trainer + normalizer


def _as_message(folder: Path, model: Any) -> bool:
    from google.protobuf.message import DecodeError
    from transformers.utils import sentencepiece_model_pb2_new as messages

    theirs = messages.ModelProto()
    try:
        theirs.ParseFromString((folder / "in.model").read_bytes())
    except DecodeError:
        return False
    ours = [(piece.text, struct.pack("<f", piece.score), int(piece.type)) for piece in model.pieces]
    other = [(piece.piece, struct.pack("<f", piece.score), piece.type) for piece in theirs.pieces]
    if ours != other:
        first = next((pair for pair in zip(ours, other) if pair[0] != pair[1]), (len(ours), len(other)))
        raise MismatchError(f"pieces: {first}")
    stated = (int(model.algorithm), model.byte_fallback, model.dummy_prefix, model.trims)
    read = (
        theirs.trainer_spec.model_type,
        theirs.trainer_spec.byte_fallback,
        theirs.normalizer_spec.add_dummy_prefix,
        theirs.normalizer_spec.remove_extra_whitespaces,
    )
    if stated != read:
        raise MismatchError(f"settings: {stated} here and {read} there")
    return True


def _gemma_seeds(folder: Path) -> list[Case]:
    path = GOLDEN / "cases/paligemma2/tokenizer/companions/paligemma_tokenizer.model"
    return [{"paligemma_tokenizer.model": path.read_bytes()}]


def _florence_seeds(folder: Path) -> list[Case]:
    names = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "merges.txt", "added_tokens.json")
    main = _companions("florence2/tiny-main", *names)
    parts = _companions("florence2/tiny-vocab-4k", "vocab.json", "merges.txt", "added_tokens.json")
    return [main, parts]


def _moondream_seeds(folder: Path) -> list[Case]:
    new = _companions("moondream2/tiny-2025-06-21", "tokenizer.json")
    parts = _companions("moondream2/tiny-2024-04-02", "vocab.json", "merges.txt", "added_tokens.json")
    return [new, parts]


def _as_json(folder: Path, vocabulary: Any) -> bool:
    """Each token's id as it stands in tokenizer.json, or in vocab.json."""
    whole = folder / "tokenizer.json"
    if whole.is_file():
        theirs = json.loads(whole.read_bytes())["model"]["vocab"]
    else:
        theirs = json.loads((folder / "vocab.json").read_bytes())
    ours = vocabulary.data["model"]["vocab"]
    if any(ours.get(token) != index for token, index in theirs.items() if token in ours) or len(theirs) < len(ours):
        raise MismatchError("ids: of tokens differ")
    return True


def _blip2_seeds(folder: Path) -> list[Case]:
    base = GOLDEN / "cases/blip2/opt-tiny/companions"
    names = ("config.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    found = {
        path.name: path.read_bytes() for path in base.rglob("*") if path.name in names and "bert" not in str(path)
    }
    return [found]


TARGETS = (
    Target("ofa-vocabulary", _ofa_seeds, change, _read_ofa, _as_lines, ("tokenizers/",)),
    Target(
        "sentencepiece",
        _sentencepiece_seeds,
        change,
        lambda folder: read_sentencepiece(folder / "in.model"),
        _as_message,
        ("tokenizers/",),
    ),
    Target(
        "gemma-vocabulary",
        _gemma_seeds,
        change,
        lambda folder: read_paligemma2(folder / "paligemma_tokenizer.model"),
        modules=("tokenizers/", "families/paligemma2/tokenizer"),
    ),
    Target(
        "florence2-tokenizer",
        _florence_seeds,
        change,
        read_florence2_vocabulary,
        _as_json,
        ("families/florence2/tokenizer", "tokenizers/"),
    ),
    Target(
        "moondream2-tokenizer",
        _moondream_seeds,
        change,
        read_moondream2,
        _as_json,
        ("families/moondream2/tokenizer", "tokenizers/"),
    ),
    Target("opt-tokenizer", _blip2_seeds, change, partial(load_tokenizer, "opt"), modules=("families/blip2/",)),
)
