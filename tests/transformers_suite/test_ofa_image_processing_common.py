"""transformers' own common tests of image processors, on OFA's."""

from __future__ import annotations

import unittest

import pytest
import stand_ins

stand_ins.install()
common = pytest.importorskip("tests.test_image_processing_common", reason="run.py brings transformers' own tests")

from weightport.modeling.ofa.image_processing_ofa import OFAImageProcessor  # noqa: E402


class OFAImageProcessingTester(common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": OFAImageProcessor}


class OFAImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = OFAImageProcessingTester

    @unittest.skip("OFA's numbers are PIL's; torchvision's filters differ and are not offered")
    def test_new_models_require_torchvision_backend(self):
        """Does not apply."""
