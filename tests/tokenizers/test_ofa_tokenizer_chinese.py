from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from vocabularies import BRACKETED, PIECES, write_chinese, write_lines

from weightport.errors import VocabularyError
from weightport.families.ofa.tokenizer import build_ofa_tokenizer
from weightport.tokenizers.sources import read_ofa_vocabulary

CODES, BINS = 16, 10
FIRST_CODE = 4 + len(PIECES) + 1
ROWS = FIRST_CODE + CODES + BINS

TEXTS = [
    "图片描述了什么内容?",
    "一只狗, the Dog's iPhone12!",
    "“狗” — …",
    "Café crème İstanbul Å naïve",
    "don't 1,000 0.5 http://a.b/c?d=e",
    "[MASK]图[UNK] [mask] a[SEP]b",
    "<bin_3> <code_5> <mask> <s> </s> <pad> <unk>",
    "a\u2028b\u200bc\u00a0d\u3000e\x07f\ufffdg\U0010ffffh\u0378i",
    "𠮷𫠠 👍👍 🤣",
    "x" * 100,
    "x" * 101,
    "",
    " \n\t ",
]


@pytest.fixture
def folder(tmp_path):
    return write_chinese(tmp_path / "BERT_CN_dict")


@pytest.fixture
def tokenizer(folder):
    return build_ofa_tokenizer(folder, ROWS, num_bins=BINS, code_dict_size=CODES)


def original_ids(folder, text: str) -> list[int]:
    """The original's pipeline: slow BertTokenizer, pieces joined by spaces, looked up in fairseq's dictionary."""
    return read_ofa_vocabulary(folder).dictionary.encode(
        " ".join(BertTokenizerLegacy(str(folder / "vocab.txt")).tokenize(text))
    )


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_slow_bert_tokenizer_and_fairseq(folder, tokenizer, text):
    assert tokenizer(text).input_ids == [0, *original_ids(folder, text), 2]


def test_ids_agree_over_random_unicode(folder, tokenizer):
    blocks = [(0x20, 0x7E), (0xA0, 0x2FF), (0x370, 0xFFF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF)]
    blocks += [(0x1E00, 0x1FFF), (0xF900, 0xFFFF), (0x1F300, 0x1F6FF), (0x2A700, 0x2CEAF)]
    generator = random.Random(0)
    slow = BertTokenizerLegacy(str(folder / "vocab.txt"))
    encode = read_ofa_vocabulary(folder).dictionary.encode
    for _ in range(400):
        words = (chr(generator.randint(*generator.choice(blocks))) for _ in range(8))
        text = "".join(word + generator.choice(["", "", " ", "the"]) for word in words)
        assert tokenizer(text, add_special_tokens=False).input_ids == encode(" ".join(slow.tokenize(text))), ascii(
            text
        )


@pytest.mark.parametrize("text", TEXTS)
def test_decoded_text_is_the_slow_tokenizers(folder, tokenizer, text):
    slow = BertTokenizerLegacy(str(folder / "vocab.txt"))
    expected = slow.clean_up_tokenization(slow.convert_tokens_to_string(slow.tokenize(text)))
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == expected


def test_every_row_of_the_embedding_has_one_token(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == ROWS
    assert sorted(tokenizer.get_vocab().values()) == list(range(ROWS))


def test_unknown_characters_take_berts_row_and_unknown_symbols_fairseqs(tokenizer):
    assert tokenizer("龘", add_special_tokens=False).input_ids == [4 + BRACKETED.index("[UNK]")]
    assert tokenizer.convert_tokens_to_ids(["<bin_10>", "狗狗"]) == [3, 3]


def test_symbols_have_the_original_ids(tokenizer):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<code_0>", "<code_15>", "<bin_0>", "<bin_9>"]
    last = FIRST_CODE + CODES
    expected = [0, 1, 2, 3, FIRST_CODE - 1, FIRST_CODE, last - 1, last, last + 9]
    assert tokenizer.convert_tokens_to_ids(symbols) == expected


def test_symbols_in_text_are_parsed_only_on_request(folder, tokenizer):
    text = "狗 <bin_3> <code_5>"
    parsing = build_ofa_tokenizer(folder, ROWS, num_bins=BINS, code_dict_size=CODES, parse_symbols=True)
    dog = 4 + PIECES.index("狗")
    assert parsing(text).input_ids == [0, dog, FIRST_CODE + CODES + 3, FIRST_CODE + 5, 2]
    assert len(tokenizer(text).input_ids) > 10
    assert parsing.decode(parsing(text).input_ids, skip_special_tokens=True) == text
    assert len(parsing) == ROWS
    assert parsing("<s></s><pad><unk>").input_ids == tokenizer("<s></s><pad><unk>").input_ids


@pytest.mark.parametrize("parse_symbols", [False, True])
def test_saved_tokenizer_loads_as_a_stock_class_with_the_same_ids(folder, tmp_path, parse_symbols):
    tokenizer = build_ofa_tokenizer(
        folder, ROWS, num_bins=BINS, code_dict_size=CODES, parse_symbols=parse_symbols, model_max_length=200
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert type(loaded).__module__.startswith("transformers.")
    assert (loaded.model_max_length, loaded.padding_side, len(loaded)) == (200, "right", ROWS)
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
        ids = tokenizer(text).input_ids
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_row_one_and_masked(tokenizer, side):
    batch = tokenizer(["狗", "一只狗"], padding=True, padding_side=side, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["input_ids"].shape == (2, 5)
    assert ((batch["input_ids"] == 1) == (batch["attention_mask"] == 0)).all()
    assert bool(batch["attention_mask"][0, 0]) == (side == "right")


@pytest.mark.parametrize("kept", ["vocab.txt", "dict.txt"])
def test_one_file_of_the_pair_gives_the_same_ids(folder, tokenizer, kept):
    for name in {"vocab.txt", "dict.txt"} - {kept}:
        (folder / name).unlink()
    for source in (folder, folder / kept):
        alone = build_ofa_tokenizer(source, ROWS, num_bins=BINS, code_dict_size=CODES)
        assert [alone(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_a_vocabulary_that_begins_with_the_special_symbols_names_the_rows_itself(tmp_path, tokenizer):
    path = write_lines(tmp_path / "vocab.txt", ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "<mask>"])
    port = build_ofa_tokenizer(path, ROWS, num_bins=BINS, code_dict_size=CODES)
    assert port.get_vocab() == tokenizer.get_vocab()
    assert [port(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_only_newlines_end_a_line_of_the_vocabulary(tmp_path):
    # As in BERT_CN_dict: U+2028 stands in vocab.txt, and dict.txt has an empty symbol in its place.
    pieces, symbols = [*PIECES, "\u2028", "##\u2028", "猫"], [*PIECES, "", "##", "猫"]
    rows = 4 + len(pieces) + 1
    for name, vocabulary in (
        ("both", write_chinese(tmp_path / "both", pieces, symbols)),
        ("vocab", write_chinese(tmp_path / "vocab", pieces) / "vocab.txt"),
    ):
        tokenizer = build_ofa_tokenizer(vocabulary, rows)
        assert tokenizer.convert_tokens_to_ids("猫") == rows - 2, name
        assert tokenizer("a\u2028b").input_ids == tokenizer("a b").input_ids


def test_windows_line_ends_change_nothing(folder, tokenizer):
    for name in ("vocab.txt", "dict.txt"):
        path = folder / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    port = build_ofa_tokenizer(folder, ROWS, num_bins=BINS, code_dict_size=CODES)
    assert port.get_vocab() == tokenizer.get_vocab()


def test_a_symbol_of_the_dictionary_alone_is_never_produced_from_text(tmp_path):
    # "picture" is no piece of vocab.txt, so BERT never yields it, though its row exists.
    folder = write_chinese(tmp_path, PIECES, [*PIECES, "picture"])
    tokenizer = build_ofa_tokenizer(folder, 4 + len(PIECES) + 2)
    assert tokenizer("picture").input_ids == [0, *original_ids(folder, "picture"), 2]
    assert len(tokenizer("picture").input_ids) == 9


def test_vocab_and_dict_of_different_models_are_refused(tmp_path):
    folder = write_chinese(tmp_path, PIECES, [piece for piece in PIECES if piece != "狗"])
    with pytest.raises(VocabularyError, match=r"1 pieces of vocab.txt are missing in dict.txt.*'狗'"):
        build_ofa_tokenizer(folder, 4 + len(PIECES))
