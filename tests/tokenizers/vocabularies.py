"""Small vocabularies in the original's file formats, written where a test wants them."""

from __future__ import annotations

import json
from pathlib import Path

BRACKETED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *BRACKETED,
    *"!\"#',./:;<=>?[]_",
    *"？。，",
    *"0123456789abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "0123456789abcdefghijklmnopqrstuvwxyz"),
    *("the", "##ing", "iphone", "bin", "code", "mask", "don"),
    *"图片描述了什么内容一只狗",
    "👍",
]
# GPT-2's 256 byte characters, the printable ones as they are, the others shifted beyond Latin-1.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARACTERS = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("in", "g"), ("a", "t"), ("Ġ", "i"), ("1", "2")]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def write_chinese(folder: Path, pieces: list[str] = PIECES, symbols: list[str] | None = None) -> Path:
    """vocab.txt and dict.txt, as in utils/BERT_CN_dict."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "vocab.txt", pieces)
    write_lines(folder / "dict.txt", [f"{symbol} 1" for symbol in (pieces if symbols is None else symbols)])
    return folder


def english_tokens() -> list[str]:
    """Tokens of the small English vocabulary, by GPT-2 id."""
    shifted = (BYTE_CHARACTERS[b] for b in range(256) if b not in PRINTABLE)
    merged = (left + right for left, right in MERGES)
    return [*(BYTE_CHARACTERS[b] for b in PRINTABLE), *shifted, *merged, "<|endoftext|>"]


def write_english(folder: Path, symbols: list[str] | None = None) -> Path:
    """encoder.json, vocab.bpe and dict.txt, as in utils/BPE: ids in another order than the dictionary's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = english_tokens()
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    write_lines(folder / "vocab.bpe", ["#version: 0.2", *(" ".join(merge) for merge in MERGES)])
    by_frequency = [str(i) for i in reversed(range(len(tokens)))]
    words = [*by_frequency, "madeupword0000", "madeupword0001"] if symbols is None else symbols
    write_lines(folder / "dict.txt", [f"{symbol} 1" for symbol in words])
    return folder
