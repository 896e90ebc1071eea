"""transformers' own common tests of models, on OFA's."""

from __future__ import annotations

import unittest

import pytest

common = pytest.importorskip("tests.test_modeling_common", reason="run.py brings transformers' own tests")

import torch  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from weightport.modeling.ofa.configuration_ofa import OFAConfig  # noqa: E402
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration, OFAModel  # noqa: E402

RESNET = {"model_type": "resnet", "depths": [1, 1, 1], "embedding_size": 4, "hidden_sizes": [4, 8, 12]}
VIT = {
    "model_type": "ofa_vit",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
}
# The tests look up by these tables which class has a head, and which class no loss.
modeling_auto.MODEL_MAPPING_NAMES["ofa"] = "OFAModel"
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["ofa"] = "OFAForConditionalGeneration"


class RepeatingOFA(OFAForConditionalGeneration):
    """TrainingTesterMixin asks for the rest of a text; an encoder-decoder is shown the text, and gives it back."""

    text: torch.Tensor

    def generate(self, prompt_ids, **options):
        options = {**options, "max_new_tokens": self.text.shape[1], "ofa_eos_at_max_length": False}
        return super().generate(self.text, **options)[:, 1:]


class OFAModelTester:
    """A tiny OFA and inputs for it: 2 x 2 patches, then a text."""

    batch_size = 3
    text_length = 7
    num_patches = 4
    encoder_seq_length = num_patches + text_length
    seq_length = decoder_seq_length = 5
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = True
    causal_lm_class = RepeatingOFA  # what TrainingTesterMixin trains

    def __init__(self, parent, **options):
        self.parent = parent
        self.options = options

    def get_config(self) -> OFAConfig:
        return OFAConfig(
            vocab_size=99,
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=40,
            decoder_ffn_dim=36,
            max_position_embeddings=64,
            decoder_max_position_embeddings=64,
            dropout=0.0,
            encoder_drop_path_rate=0.0,
            decoder_drop_path_rate=0.0,
            token_bucket_size=8,
            image_bucket_size=4,
            code_image_size=16,
            image_size=32,
            num_bins=10,
            code_dict_size=8,
            **{"vision_config": RESNET, **self.options},
        )

    def prepare_config_and_inputs(self):
        # Ids of 4 and more: neither padding nor another special token.
        input_ids = common.ids_tensor([self.batch_size, self.text_length], 95) + 4
        decoder_input_ids = common.ids_tensor([self.batch_size, self.decoder_seq_length], 95) + 4
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, 32, 32]),
            "patch_masks": torch.ones(self.batch_size, dtype=torch.bool, device=input_ids.device),
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": torch.ones_like(decoder_input_ids),
            # One target is the codes of an image, so that every parameter has a part in the loss.
            "code_masks": torch.arange(self.batch_size, device=input_ids.device) == 0,
        }

    def prepare_config_and_inputs_for_common(self):
        return self.prepare_config_and_inputs()


class OFAModelTest(common.ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (OFAModel, OFAForConditionalGeneration)
    is_encoder_decoder = True
    model_tester = None
    # So small a model needs larger steps to learn a sentence by heart.
    training_overfit_learning_rate = 5e-3

    def setUp(self):
        self.model_tester = OFAModelTester(self)

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        # Past the special tokens: padding is no target.
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size - 4)
        batch = {name: ids + 4 for name, ids in batch.items()}
        RepeatingOFA.text = batch["input_ids"][:1]
        return batch

    @unittest.skip("the generation tests are not in transformers' source distribution: their mix-in is an empty one")
    def test_generation_tester_mixin_inheritance(self):
        """Does not apply."""


class OtherOptionsOFAModelTest(OFAModelTest):
    """Every switch the other way, and the vision transformer."""

    def setUp(self):
        self.model_tester = OFAModelTester(
            self,
            vision_config=VIT,
            scale_attn=False,
            scale_fc=False,
            scale_heads=False,
            scale_resids=True,
            patch_layernorm_embedding=False,
            code_layernorm_embedding=False,
            add_type_embedding=False,
            encoder_normalize_before=False,
            decoder_normalize_before=False,
            entangle_position_embedding=True,
            disable_entangle=False,
            scale_embedding=True,
            interpolate_position=True,
            orig_patch_image_size=16,
            attn_scale_factor=1.5,
            share_all_embeddings=False,
        )

    @unittest.skip("encoder and decoder embed with tables of their own; the test embeds the target with the encoder's")
    def test_inputs_embeds_matches_input_ids(self):
        """Does not apply."""
