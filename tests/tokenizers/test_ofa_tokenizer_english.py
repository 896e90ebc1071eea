from __future__ import annotations

import json
from itertools import pairwise

import pytest
import regex
from transformers import AutoTokenizer
from vocabularies import BYTE_CHARACTERS, MERGES, english_tokens, write_english, write_lines

from weightport.errors import VocabularyError
from weightport.families.ofa.tokenizer import build_ofa_tokenizer

TOKENS = english_tokens()
WORDS = len(TOKENS) + 2
CODES, BINS = 8, 5
ROWS = 4 + WORDS + 1 + CODES + BINS
# The pattern of GPT-2's encoder.py.
GPT2_WORDS = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

TEXTS = [
    " what does the image describe?",
    "what the thing is 12 3",
    "  double  space ",
    " the the\nthe\tthe",
    "don't it's we'll",
    " 中文 👍 café",
    " <bin_1> <mask> <s> </s>",
    "<|endoftext|> madeupword0000",
    "",
]


def original_ids(text: str) -> list[int]:
    """GPT-2's BPE as its authors wrote it: the earliest merge first, then ids, then the dictionary's rows."""
    ids = []
    for word in GPT2_WORDS.findall(text):
        parts = [BYTE_CHARACTERS[b] for b in word.encode()]
        while pairs := [p for p in pairwise(parts) if p in MERGES]:
            best = min(pairs, key=MERGES.index)
            at = next(n for n, pair in enumerate(pairwise(parts)) if pair == best)
            parts[at : at + 2] = ["".join(best)]
        ids += [TOKENS.index(part) for part in parts]
    # dict.txt lists the ids backwards, from row 4 on.
    return [4 + len(TOKENS) - 1 - i for i in ids]


@pytest.fixture
def folder(tmp_path):
    return write_english(tmp_path / "BPE")


@pytest.fixture
def tokenizer(folder):
    return build_ofa_tokenizer(folder, ROWS, num_bins=BINS, code_dict_size=CODES)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_go_through_the_dictionary(tokenizer, text):
    assert tokenizer(text).input_ids == [0, *original_ids(text), 2]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_every_row_of_the_embedding_has_one_token(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == ROWS
    assert sorted(tokenizer.get_vocab().values()) == list(range(ROWS))
    words = ["madeupword0000", "<mask>", "<code_0>", "<bin_4>", "<bin_5>"]
    assert tokenizer.convert_tokens_to_ids(words) == [2 + WORDS, 4 + WORDS, 5 + WORDS, ROWS - 1, 3]


def test_saved_tokenizer_loads_with_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert [loaded(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_symbols_in_text_are_parsed_only_on_request(folder, tokenizer):
    parsing = build_ofa_tokenizer(folder, ROWS, num_bins=BINS, code_dict_size=CODES, parse_symbols=True)
    assert parsing("<bin_1><bin_0>").input_ids == [0, ROWS - 4, ROWS - 5, 2]
    assert tokenizer("<bin_1>").input_ids == [0, *original_ids("<bin_1>"), 2]


def test_a_word_of_the_dictionary_does_not_shadow_a_token(tmp_path):
    # The symbol "12" is GPT-2's id 12 and not the token "12"; "ing" is no id at all.
    ids = [str(i) for i in range(len(TOKENS))]
    folder = write_english(tmp_path, [*ids, "ing"])
    tokenizer = build_ofa_tokenizer(folder, 4 + len(ids) + 2)
    assert tokenizer("12", add_special_tokens=False).input_ids == [4 + TOKENS.index("12")]
    assert tokenizer("ing", add_special_tokens=False).input_ids == [4 + TOKENS.index("ing")]


def test_a_byte_that_the_dictionary_lacks_is_unknown(tmp_path):
    ids = [str(i) for i in range(len(TOKENS)) if TOKENS[i] != "~"]
    tokenizer = build_ofa_tokenizer(write_english(tmp_path, ids), 4 + len(ids) + 1)
    assert tokenizer("~~", add_special_tokens=False).input_ids == [3, 3]


def test_a_merged_token_that_the_dictionary_lacks_is_refused(tmp_path):
    ids = [str(i) for i in range(len(TOKENS)) if TOKENS[i] != "ing"]
    with pytest.raises(VocabularyError, match=r"merges 1 tokens that have no row .*'ing', missing in dict.txt"):
        build_ofa_tokenizer(write_english(tmp_path, ids), 4 + len(ids) + 1)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "dict.txt"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(VocabularyError, match=f"lacks {name}"):
        build_ofa_tokenizer(folder, ROWS)


def test_the_english_dictionary_alone_is_refused(folder):
    with pytest.raises(VocabularyError, match=r"is English.*encoder\.json and vocab\.bpe"):
        build_ofa_tokenizer(folder / "dict.txt", ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("encoder.json", "{"),
        ("encoder.json", "[1, 2]"),
        ("encoder.json", json.dumps({"a": "0"})),
        ("encoder.json", json.dumps({"a": 0, "b": 0})),
        ("vocab.bpe", "#version: 0.2\na b c\n"),
    ],
)
def test_a_malformed_file_is_refused_by_name(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(VocabularyError, match=name):
        build_ofa_tokenizer(folder, ROWS)


def test_a_text_that_is_not_utf8_is_refused(folder):
    (folder / "dict.txt").write_bytes(b"\xff\xfe 1\n")
    with pytest.raises(VocabularyError, match="not UTF-8"):
        build_ofa_tokenizer(folder, ROWS)


def test_decimal_symbols_beyond_gpt2_are_rows_without_text(tmp_path):
    folder = write_english(tmp_path)
    path = folder / "dict.txt"
    write_lines(path, [*path.read_text().splitlines(), "99999 1"])
    tokenizer = build_ofa_tokenizer(folder, 4 + WORDS + 2)
    assert tokenizer.convert_tokens_to_ids("99999") == 4 + WORDS
