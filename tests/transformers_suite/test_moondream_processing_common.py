"""transformers' own common tests of processors, on Moondream's."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import stand_ins

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.append(str(GOLDEN))
stand_ins.install()
common = pytest.importorskip("tests.test_processing_common", reason="run.py brings transformers' own tests")

from golden import materialize  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from weightport.families.moondream2.tokenizer import build_tokenizer, image_token_id, read_vocabulary  # noqa: E402
from weightport.modeling.moondream.image_processing_moondream import MoondreamImageProcessor  # noqa: E402
from weightport.modeling.moondream.processing_moondream import MoondreamProcessor  # noqa: E402


class MoondreamProcessorCommonTests(common.ProcessorTesterMixin):
    processor_class = MoondreamProcessor
    case = ""
    views = "none"

    @classmethod
    def _setup_image_processor(cls):
        return MoondreamImageProcessor(
            size={"height": 28, "width": 28}, views=cls.views, overlap_margin=0, image_seq_length=4
        )

    @classmethod
    def _setup_tokenizer(cls):
        folder = Path(tempfile.mkdtemp()) / cls.case
        materialize(GOLDEN / "cases/moondream2" / cls.case, folder)
        vocabulary = read_vocabulary(folder)
        tokenizer = build_tokenizer(vocabulary, image_token_id(vocabulary), 2048)
        # The tests compare with what the tokenizer gives by itself; the processor puts the start token first.
        start = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[start]
        )
        return tokenizer

    @unittest.skip("the processor encodes a prompt in pieces and gives no offsets into it")
    def test_apply_chat_template_assistant_mask(self):
        """Does not apply."""


class WordsMoondreamProcessorTest(MoondreamProcessorCommonTests, unittest.TestCase):
    """Prompts in words and one view, as in 2024-04-02."""

    case = "tiny-2024-04-02"


class MarksMoondreamProcessorTest(MoondreamProcessorCommonTests, unittest.TestCase):
    """Prompts of ids, and several views, as in 2025."""

    case, views = "tiny-2025-06-21", "tiles"

    @unittest.skip("prompts have ids that no text gives the tokenizer")
    def test_apply_chat_template_image_0(self):
        """Does not apply."""

    @unittest.skip("prompts have ids that no text gives the tokenizer")
    def test_apply_chat_template_image_1(self):
        """Does not apply."""

    @staticmethod
    def prepare_processor_dict():
        return {
            "templates": {
                "query": {"prefix": [1, 300, 2], "suffix": [3, 3]},
                "caption": {"short": [1, 301, 2, 302, 3], "normal": [1, 301, 2, 303, 3]},
            },
            "clean_spaces": False,
        }
