"""transformers' own common tests of models, on Moondream's."""

from __future__ import annotations

import unittest

import pytest

common = pytest.importorskip("tests.test_modeling_common", reason="run.py brings transformers' own tests")

import torch  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from weightport.modeling.moondream.configuration_moondream import MoondreamConfig  # noqa: E402
from weightport.modeling.moondream.modeling_moondream import (  # noqa: E402
    MoondreamForConditionalGeneration,
    MoondreamModel,
)

IMAGE, PATCHES = 3, 4
# The tests look up by these tables which class has a head, and which class no loss.
modeling_auto.MODEL_MAPPING_NAMES["moondream"] = "MoondreamModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["moondream"] = "MoondreamForConditionalGeneration"


class MoondreamModelTester:
    """A tiny Moondream and inputs for it: a start token, 2 x 2 patches, then a text."""

    batch_size = 3
    seq_length = 1 + PATCHES + 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent, **options):
        self.parent = parent
        self.options = options

    def get_config(self) -> MoondreamConfig:
        text = {
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
        vision = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        return MoondreamConfig(
            text_config=text, vision_config=vision, projector_hidden_size=40, image_token_id=IMAGE, **self.options
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], 80) + 4
        input_ids[:, 1 : 1 + PATCHES] = IMAGE
        views = [] if config.feature_merge == "none" else [3]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, *views, 3, 28, 28]),
        }
        if views:
            grids = [[1, 2], [2, 1], [0, 0]][: self.batch_size]
            inputs["image_grids"] = torch.tensor(grids, device=input_ids.device)
        return config, inputs

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class MoondreamModelTest(common.ModelTesterMixin, unittest.TestCase):
    """One view a picture, as in the revisions up to 2024-05-08."""

    all_model_classes = (MoondreamModel, MoondreamForConditionalGeneration)
    is_encoder_decoder = False
    _is_composite = True
    model_tester = None
    options: dict = {}

    def setUp(self):
        self.model_tester = MoondreamModelTester(self, **self.options)

    @unittest.skip("the generation tests are not in transformers' source distribution: their mix-in is an empty one")
    def test_generation_tester_mixin_inheritance(self):
        """Does not apply."""


class TilesMoondreamModelTest(MoondreamModelTest):
    """Several views, prefix attention and the region head, as in 2025."""

    # The region head has no part in the loss of a text.
    test_all_params_have_gradient = False
    # The projector sees two views side by side, twice the tower's width.
    skip_test_image_features_output_shape = True
    options = {
        "feature_merge": "tiles",
        "overlap_margin": 0,
        "prefix_bidirectional": True,
        "region_config": {
            "kind": "bins",
            "coord_feat_dim": 8,
            "coord_out_dim": 16,
            "size_feat_dim": 8,
            "size_out_dim": 32,
            "inner_dim": 20,
        },
    }
