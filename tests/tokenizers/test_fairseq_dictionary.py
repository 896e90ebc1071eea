from __future__ import annotations

import pytest

from weightport.errors import VocabularyError
from weightport.tokenizers.dictionary import UNK, Dictionary, parse_dictionary


def test_lines_follow_the_four_special_symbols():
    dictionary = parse_dictionary(["the 12", "of 3"], "dict.txt")
    assert dictionary.symbols == ("<s>", "<pad>", "</s>", "<unk>", "the", "of")
    assert dictionary.encode(" of  the\tfoo ") == [5, 4, UNK]


def test_a_symbol_keeps_its_spaces_and_may_be_empty():
    dictionary = parse_dictionary(["a b 7", " 1"], "dict.txt")
    assert dictionary.symbols[4:] == ("a b", "")


def test_an_overwriting_symbol_takes_the_later_row():
    dictionary = parse_dictionary(["x 1", "<s> 9 #fairseq:overwrite", "x 2 #fairseq:overwrite"], "dict.txt")
    assert len(dictionary) == 7
    assert (dictionary.index("<s>"), dictionary.index("x")) == (5, 6)


def test_a_symbol_twice_is_refused_with_its_line():
    with pytest.raises(VocabularyError, match=r"dict\.txt, line 2.*'x' is there already"):
        parse_dictionary(["x 1", "x 2"], "dict.txt")


@pytest.mark.parametrize("line", ["", "word", "word many", "word 1.5"])
def test_a_line_without_a_count_is_refused(line):
    with pytest.raises(VocabularyError, match="line 1: expected `symbol count`"):
        parse_dictionary([line], "dict.txt")


def test_added_symbols_do_not_move_one_that_is_there():
    dictionary = Dictionary(("<s>", "<pad>", "</s>", "<unk>", "<mask>")).extended(["<mask>", "<bin_0>", "<bin_0>"])
    assert dictionary.symbols[4:] == ("<mask>", "<bin_0>")


def test_every_row_has_a_name_of_its_own():
    dictionary = parse_dictionary(["x 1", " 1", "x 1 #fairseq:overwrite", "reachable 1"], "dict.txt")
    names = dictionary.row_names(is_taken=lambda symbol: symbol == "reachable")
    assert names[4:] == ["<row_4>", "<row_5>", "x", "<row_7>"]
