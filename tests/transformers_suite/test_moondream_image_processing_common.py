"""transformers' own common tests of image processors, on Moondream's."""

from __future__ import annotations

import unittest

import pytest
import stand_ins

stand_ins.install()
common = pytest.importorskip("tests.test_image_processing_common", reason="run.py brings transformers' own tests")

from weightport.modeling.moondream.image_processing_moondream import MoondreamImageProcessor  # noqa: E402


class MoondreamImageProcessingTester(common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": MoondreamImageProcessor}


class MoondreamImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    """One view a picture, as in the revisions up to 2024-05-08."""

    image_processor_tester_class = MoondreamImageProcessingTester

    @unittest.skip("Moondream's numbers are Pillow's; torchvision's filters differ and are not offered")
    def test_new_models_require_torchvision_backend(self):
        """Does not apply."""
