"""What happens when vocabulary and embedding do not belong together, and where vocabularies may come from."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from vocabularies import PIECES, write_chinese, write_english, write_lines

from weightport.errors import VocabularyError
from weightport.families.ofa.tokenizer import build_ofa_tokenizer
from weightport.tokenizers import sources

BASE = 4 + len(PIECES) + 1


@pytest.fixture
def chinese(tmp_path):
    return write_chinese(tmp_path / "BERT_CN_dict")


@pytest.fixture
def english(tmp_path):
    return write_english(tmp_path / "BPE")


def test_a_chinese_checkpoint_with_the_english_vocabulary(english):
    with pytest.raises(VocabularyError, match="30325 rows") as caught:
        build_ofa_tokenizer(english, 30325, num_bins=1000, code_dict_size=8192, bpe="bert")
    message = str(caught.value)
    assert "30325 rows" in message and "BPE gives 9464 tokens" in message
    assert "This checkpoint is Chinese (OFA-CN): give the BERT_CN_dict folder" in message


def test_an_english_checkpoint_with_the_chinese_vocabulary(chinese):
    with pytest.raises(VocabularyError, match="This checkpoint is English: give the utils/BPE folder"):
        build_ofa_tokenizer(chinese, 59457, num_bins=1000, code_dict_size=8192)


def test_the_checkpoints_bpe_option_tells_the_language_of_other_sizes(english):
    with pytest.raises(VocabularyError, match="This checkpoint is Chinese"):
        build_ofa_tokenizer(english, 500, num_bins=40, code_dict_size=64, bpe="bert")


@pytest.mark.parametrize("rows", [BASE - 5, BASE + 7, BASE + 100])
def test_a_vocabulary_of_another_size_is_refused(chinese, rows):
    with pytest.raises(VocabularyError, match=rf"has {rows} rows.*gives {BASE} tokens"):
        build_ofa_tokenizer(chinese, rows)
    with pytest.raises(VocabularyError, match=rf"has {rows} rows.*gives {BASE + 30} tokens \(20 codes and 10 bins\)"):
        build_ofa_tokenizer(chinese, rows, num_bins=10, code_dict_size=20)


@pytest.mark.parametrize(("codes", "bins"), [(0, 0), (0, 1000), (8192, 1000)])
def test_codes_and_bins_are_inferred_when_only_one_reading_is_usual(chinese, codes, bins):
    tokenizer = build_ofa_tokenizer(chinese, BASE + codes + bins)
    assert (tokenizer.convert_tokens_to_ids("<code_0>") != 3) == (codes > 0)
    assert (tokenizer.convert_tokens_to_ids("<bin_999>") != 3) == (bins > 0)


@pytest.mark.parametrize(("known", "value"), [("num_bins", 10), ("code_dict_size", 20)])
def test_the_one_number_that_is_known_gives_the_other(chinese, known, value):
    tokenizer = build_ofa_tokenizer(chinese, BASE + 30, **{known: value})
    assert tokenizer.convert_tokens_to_ids(["<code_0>", "<code_19>", "<bin_0>", "<bin_9>"]) == [
        BASE,
        BASE + 19,
        BASE + 20,
        BASE + 29,
    ]


def test_a_dictionary_that_lists_every_symbol_decides_their_order(tmp_path):
    further = ["<seg_0>", "<mask>", "<bin_0>", "<bin_1>", "<code_0>"]
    folder = write_chinese(tmp_path, PIECES, [*PIECES, *further])
    tokenizer = build_ofa_tokenizer(folder, BASE - 1 + len(further))
    assert tokenizer.convert_tokens_to_ids(further) == list(range(BASE - 1, BASE + 4))
    tokenizer = build_ofa_tokenizer(folder, BASE - 1 + len(further), num_bins=2, code_dict_size=1)
    assert tokenizer.convert_tokens_to_ids(further) == list(range(BASE - 1, BASE + 4))


def test_an_empty_folder_and_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        VocabularyError, match=r"holds no vocabulary.*\n.*Expected a folder with vocab.txt and dict.txt"
    ):
        build_ofa_tokenizer(tmp_path, BASE)
    with pytest.raises(VocabularyError, match="There is no vocabulary at"):
        build_ofa_tokenizer(tmp_path / "a" / "b" / "c", BASE)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(VocabularyError, match="is not a vocabulary"):
        build_ofa_tokenizer(tmp_path / "model.bin", BASE)
    with pytest.raises(VocabularyError, match="is empty"):
        build_ofa_tokenizer(write_lines(tmp_path / "vocab.txt", []), BASE)


def test_a_token_twice_in_a_vocabulary_that_stands_alone(tmp_path):
    with pytest.raises(VocabularyError, match="'狗' stands there twice"):
        build_ofa_tokenizer(write_lines(tmp_path / "vocab.txt", [*PIECES, "狗"]), BASE + 1)


def test_a_token_twice_at_the_end_of_a_long_vocabulary_is_found_in_one_pass(tmp_path):
    started = time.process_time()
    pieces = [f"piece{number}" for number in range(50_000)]
    with pytest.raises(VocabularyError, match="'piece49999' stands there twice"):
        build_ofa_tokenizer(write_lines(tmp_path / "vocab.txt", [*pieces, pieces[-1]]), BASE)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("content", ['{"a": %s}' % ("9" * 5000), '{"\\ud800": 1}', "[" * 100_000, '{"a": "b"}'])
def test_an_encoder_that_is_no_map_to_ids_is_refused(tmp_path, content: str):
    for name in ("vocab.bpe", "dict.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "encoder.json").write_text(content)
    with pytest.raises(VocabularyError, match=r"encoder\.json(:| is not JSON)"):
        build_ofa_tokenizer(tmp_path, BASE)


def test_a_hub_repository_gives_its_vocab_txt(chinese, monkeypatch):
    asked = []

    def download(repository: str, name: str) -> Path:
        asked.append((repository, name))
        return Path(chinese / name)

    monkeypatch.setattr(sources, "download", download)
    tokenizer = build_ofa_tokenizer("bert-base-chinese", BASE)
    assert asked == [("bert-base-chinese", "vocab.txt")]
    assert tokenizer.get_vocab() == build_ofa_tokenizer(chinese, BASE).get_vocab()


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    def download(repository: str, name: str) -> str:
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache")

    monkeypatch.setattr(sources, "download", download)
    with pytest.raises(
        VocabularyError, match=r"no folder someone/vocabulary here.*\n?.*Cannot find the requested files"
    ):
        build_ofa_tokenizer("someone/vocabulary", BASE)
