"""transformers' own common tests of processors, on OFA's."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import stand_ins

sys.path.append(str(Path(__file__).parents[1] / "tokenizers"))
stand_ins.install()
common = pytest.importorskip("tests.test_processing_common", reason="run.py brings transformers' own tests")

import vocabularies  # noqa: E402

from weightport.families.ofa.tokenizer import build_ofa_tokenizer  # noqa: E402
from weightport.modeling.ofa.image_processing_ofa import OFAImageProcessor  # noqa: E402
from weightport.modeling.ofa.processing_ofa import OFAProcessor  # noqa: E402

CODES, BINS = 8, 10


class OFAProcessorCommonTests(common.ProcessorTesterMixin):
    processor_class = OFAProcessor

    @classmethod
    def _setup_image_processor(cls):
        return OFAImageProcessor(size=32)


class EnglishOFAProcessorTest(OFAProcessorCommonTests, unittest.TestCase):
    @classmethod
    def _setup_tokenizer(cls):
        rows = 4 + len(vocabularies.english_tokens()) + 2 + 1 + CODES + BINS
        folder = vocabularies.write_english(Path(tempfile.mkdtemp()))
        return build_ofa_tokenizer(folder, rows, num_bins=BINS)


class ChineseOFAProcessorTest(OFAProcessorCommonTests, unittest.TestCase):
    @classmethod
    def _setup_tokenizer(cls):
        rows = 4 + len(vocabularies.PIECES) + 1 + CODES + BINS
        folder = vocabularies.write_chinese(Path(tempfile.mkdtemp()))
        return build_ofa_tokenizer(folder, rows, num_bins=BINS)
