"""transformers' own common tests of tokenizers, on the English and the Chinese one of OFA."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import stand_ins
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "tokenizers"))
common = pytest.importorskip("tests.test_tokenization_common", reason="run.py brings transformers' own tests")

import vocabularies  # noqa: E402

from weightport.families.ofa.tokenizer import build_ofa_tokenizer  # noqa: E402

CODES, BINS = 8, 10


class OFATokenizerCommonTests(common.TokenizerTesterMixin):
    tokenizer_class = PreTrainedTokenizerFast
    # It rebuilds a tokenizer from vocabulary and merges alone, which only a tokenizer class of its own can.
    test_tokenizer_from_extractor = False

    @classmethod
    def setUpClass(cls):
        with patch.object(common, "get_tests_dir", stand_ins.tests_folder):
            super().setUpClass()
        cls.tmpdirname = tempfile.mkdtemp()
        cls.build(Path(tempfile.mkdtemp())).save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(PreTrainedTokenizerFast, cls.tmpdirname, {})]

    @unittest.skip("text that spells a special token stays text, as in the original")
    def test_tokenize_special_tokens(self):
        """Does not apply."""


class EnglishOFATokenizerTest(OFATokenizerCommonTests, unittest.TestCase):
    @classmethod
    def build(cls, folder):
        rows = 4 + len(vocabularies.english_tokens()) + 2 + 1 + CODES + BINS
        return build_ofa_tokenizer(vocabularies.write_english(folder), rows, num_bins=BINS)


class ChineseOFATokenizerTest(OFATokenizerCommonTests, unittest.TestCase):
    @classmethod
    def build(cls, folder):
        rows = 4 + len(vocabularies.PIECES) + 1 + CODES + BINS
        return build_ofa_tokenizer(vocabularies.write_chinese(folder), rows, num_bins=BINS)
