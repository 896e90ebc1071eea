from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

# The small vocabularies are written by the tokenizers' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tokenizers"))

from vocabularies import PIECES, english_tokens, write_chinese, write_english

from weightport.families.ofa.tokenizer import build_ofa_tokenizer
from weightport.modeling.ofa.image_processing_ofa import OFAImageProcessor
from weightport.modeling.ofa.processing_ofa import OFAProcessor

CODES, BINS = 8, 1000


@pytest.fixture
def english(tmp_path) -> OFAProcessor:
    rows = 4 + len(english_tokens()) + 2 + 1 + CODES + BINS
    folder = write_english(tmp_path / "BPE")
    return OFAProcessor(OFAImageProcessor(size=32), build_ofa_tokenizer(folder, rows, code_dict_size=CODES))


@pytest.fixture
def chinese(tmp_path) -> OFAProcessor:
    rows = 4 + len(PIECES) + 1 + CODES + BINS
    folder = write_chinese(tmp_path / "BERT_CN_dict")
    return OFAProcessor(OFAImageProcessor(size=32), build_ofa_tokenizer(folder, rows, code_dict_size=CODES))


@pytest.fixture
def image() -> Image.Image:
    return Image.radial_gradient("L").resize((64, 48)).convert("RGB")
