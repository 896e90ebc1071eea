"""Where a vocabulary comes from: a folder, one file, or a repository of the Hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightport.checkpoints.json_text import parse_json
from weightport.errors import MissingVocabularyError, VocabularyError
from weightport.hub import HUB_ERRORS, download, reason
from weightport.tokenizers.dictionary import SPECIAL_SYMBOLS, Dictionary, parse_dictionary

CHINESE_FILES = ("vocab.txt", "dict.txt")
ENGLISH_FILES = ("encoder.json", "vocab.bpe", "dict.txt")
PORTED_ENGLISH_FILES = ("vocab.json", "merges.txt")
# Rows of the English dictionary that are no BPE token.
_SYMBOL = re.compile(r"<mask>|<code_\d+>|<bin_\d+>|madeupword\d+")
EXPECTED = (
    f"Expected a folder with {' and '.join(CHINESE_FILES)} (Chinese, the original's utils/BERT_CN_dict) or with "
    f"{', '.join(ENGLISH_FILES)} (English, the original's utils/BPE), one vocab.txt, or a Hub repository that has one."
)


@dataclass(frozen=True)
class ChineseVocabulary:
    """BERT's word pieces, and the dictionary that gives each its row."""

    source: str
    pieces: tuple[str, ...] = field(repr=False)
    dictionary: Dictionary = field(repr=False)

    language = "Chinese"


@dataclass(frozen=True)
class EnglishVocabulary:
    """GPT-2's byte-level BPE, and the dictionary that gives each of its ids (as a decimal string) its row."""

    source: str
    encoder: Mapping[str, int] = field(repr=False)
    merges: tuple[tuple[str, str], ...] = field(repr=False)
    dictionary: Dictionary = field(repr=False)

    language = "English"


def read_ofa_vocabulary(source: Path | str) -> ChineseVocabulary | EnglishVocabulary:
    """Read an OFA vocabulary; its kind is told by the files.

    A folder is English when it holds encoder.json or vocab.bpe, or vocab.json and merges.txt (a directory of the
    existing transformers ports, whose ids are the rows already), else Chinese. Of the Chinese pair one file is enough:
    in BERT_CN_dict both list the same pieces in the same order. A vocab.txt that begins with fairseq's four special
    symbols (OFA-Chinese) already names the rows. Raises VocabularyError on anything missing or malformed.
    """
    path = Path(source)
    if path.is_dir():
        present = {name for name in (*CHINESE_FILES, *ENGLISH_FILES) if (path / name).is_file()}
        if present & {"encoder.json", "vocab.bpe"}:
            return _read_english(path, present)
        if all((path / name).is_file() for name in PORTED_ENGLISH_FILES):
            return _read_ported_english(path)
        return _read_chinese(path, present)
    if path.is_file():
        return _read_chinese_file(path)
    return _read_from_hub(str(source))


def _read_english(folder: Path, present: set[str]) -> EnglishVocabulary:
    if missing := [name for name in ENGLISH_FILES if name not in present]:
        raise VocabularyError(
            f"The vocabulary in {folder} lacks {', '.join(missing)}: "
            f"an English OFA needs {', '.join(ENGLISH_FILES)}.\n"
            "They stand in utils/BPE of the original repository."
        )
    encoder = _read_encoder(folder / "encoder.json")
    dictionary = _read_dictionary(folder / "dict.txt")
    return EnglishVocabulary(str(folder), encoder, _read_merges(folder / "vocab.bpe"), dictionary)


def _read_ported_english(folder: Path) -> EnglishVocabulary:
    """vocab.json gives every token its row: the dictionary names each by that row instead of by its GPT-2 id."""
    tokens = _read_encoder(folder / "vocab.json")
    ordered = sorted(tokens, key=lambda token: tokens[token])
    if tuple(ordered[: len(SPECIAL_SYMBOLS)]) != SPECIAL_SYMBOLS or sorted(tokens.values()) != list(
        range(len(tokens))
    ):
        raise VocabularyError(
            f"{folder / 'vocab.json'}: expected the rows 0 to {len(tokens) - 1}, beginning with "
            f"{' '.join(SPECIAL_SYMBOLS)}, found other ids.\n"
            "Pass --vocab with the utils/BPE folder of the original repository instead."
        )
    words = {
        token: row for token, row in tokens.items() if row >= len(SPECIAL_SYMBOLS) and not _SYMBOL.fullmatch(token)
    }
    symbols = tuple(str(row) if token in words else token for row, token in enumerate(ordered))
    dictionary = _with_added_tokens(Dictionary(symbols), folder)
    return EnglishVocabulary(str(folder), words, _read_merges(folder / "merges.txt"), dictionary)


def _with_added_tokens(dictionary: Dictionary, folder: Path) -> Dictionary:
    """The existing ports name codes and bins in added_tokens.json, where their rows follow the vocabulary's."""
    path = folder / "added_tokens.json"
    if not path.is_file():
        return dictionary
    added = _read_encoder(path)
    extended = dictionary.extended(sorted(added, key=lambda token: added[token]))
    if any(extended.rows[token] != row for token, row in added.items()):
        raise VocabularyError(f"{path}: the ids do not follow the {len(dictionary)} rows of the vocabulary.")
    return extended


def _read_merges(path: Path) -> tuple[tuple[str, str], ...]:
    # As the original reads it: the first line is a version and the last one, after the final newline, is empty.
    merges = [tuple(line.split()) for line in _read_text(path).split("\n")[1:-1]]
    pairs = tuple((merge[0], merge[1]) for merge in merges if len(merge) == 2)
    if len(pairs) != len(merges):
        raise VocabularyError(f"{path}: expected two tokens a line, found a line with another number.")
    return pairs


def _read_encoder(path: Path) -> dict[str, int]:
    try:
        encoder = parse_json(_read_text(path).encode())
    except ValueError as error:
        raise VocabularyError(f"{path} is not JSON: {error}.") from error
    valid = isinstance(encoder, dict) and all(type(i) is int for i in encoder.values())
    if not valid or len(set(encoder.values())) != len(encoder):
        raise VocabularyError(f"{path}: expected a JSON object that gives every token an integer id of its own.")
    return encoder


def _read_chinese(folder: Path, present: set[str]) -> ChineseVocabulary:
    if not present:
        raise VocabularyError(f"{folder} holds no vocabulary.\n{EXPECTED}")
    dictionary = _read_dictionary(folder / "dict.txt") if "dict.txt" in present else None
    if "vocab.txt" in present:
        pieces = _read_pieces(folder / "vocab.txt")
        if dictionary is None:
            dictionary = _with_added_tokens(_dictionary_of(pieces, str(folder / "vocab.txt")), folder)
        return ChineseVocabulary(str(folder), pieces, dictionary)
    return _from_dictionary(str(folder), dictionary or Dictionary())


def _read_chinese_file(path: Path) -> ChineseVocabulary:
    if path.suffix != ".txt":
        raise VocabularyError(f"{path} is not a vocabulary.\n{EXPECTED}")
    if path.name == "dict.txt":
        return _from_dictionary(str(path), _read_dictionary(path))
    pieces = _read_pieces(path)
    return ChineseVocabulary(str(path), pieces, _dictionary_of(pieces, str(path)))


def _from_dictionary(source: str, dictionary: Dictionary) -> ChineseVocabulary:
    symbols = dictionary.symbols[len(SPECIAL_SYMBOLS) :]
    if symbols and sum(symbol.isdecimal() for symbol in symbols) > len(symbols) // 2:
        raise VocabularyError(
            f"The dict.txt of {source} is English (its symbols are decimal GPT-2 ids): "
            f"give the folder that also holds {' and '.join(ENGLISH_FILES[:2])}."
        )
    return ChineseVocabulary(source, symbols, dictionary)


def _read_from_hub(repository: str) -> ChineseVocabulary:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repository):
        raise MissingVocabularyError(f"There is no vocabulary at {repository}.\n{EXPECTED}")
    try:
        path = download(repository, "vocab.txt")
    except HUB_ERRORS as error:
        raise VocabularyError(
            f"There is no folder {repository} here, and the Hub's repository of that name gave no vocab.txt: "
            f"{reason(error)}\n{EXPECTED}"
        ) from error
    pieces = _read_pieces(path)
    return ChineseVocabulary(repository, pieces, _dictionary_of(pieces, f"vocab.txt of {repository}"))


def _read_pieces(path: Path) -> tuple[str, ...]:
    pieces = _read_lines(path)
    if not pieces:
        raise VocabularyError(f"{path} is empty.")
    return tuple(pieces)


def _dictionary_of(pieces: tuple[str, ...], source: str) -> Dictionary:
    """The dictionary of a vocab.txt that stands alone: rows in the file's order, after the special symbols."""
    if pieces[: len(SPECIAL_SYMBOLS)] == SPECIAL_SYMBOLS:
        pieces = pieces[len(SPECIAL_SYMBOLS) :]
    symbols = (*SPECIAL_SYMBOLS, *pieces)
    if len(set(symbols)) != len(symbols):
        twice = next(symbol for symbol, times in Counter(symbols).items() if times > 1)
        raise VocabularyError(f"{source}: the token {twice!r} stands there twice, so the rows cannot be told from it.")
    return Dictionary(symbols)


def _read_dictionary(path: Path) -> Dictionary:
    return parse_dictionary(_read_lines(path), str(path))


def _read_lines(path: Path) -> list[str]:
    # Only \n ends a line: the Chinese vocabulary holds U+2028, which str.splitlines would break at.
    lines = _read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}.") from error
