"""transformers' own common tests of models, on BLIP-2 with LAVIS's own epsilon and with CLIP's ViT-L."""

from __future__ import annotations

import unittest
from fnmatch import fnmatchcase

import pytest

common = pytest.importorskip("tests.test_modeling_common", reason="run.py brings transformers' own tests")

import torch  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from weightport.modeling.blip2_lavis.configuration_blip2_lavis import Blip2LavisConfig  # noqa: E402
from weightport.modeling.blip2_lavis.modeling_blip2_lavis import (  # noqa: E402
    Blip2LavisForConditionalGeneration,
    Blip2LavisForImageTextRetrieval,
)

IMAGE, QUERIES = 98, 4
# The tests look up by these tables which class has a head, and which class no loss.
GENERATES, RETRIEVES = "Blip2LavisForConditionalGeneration", "Blip2LavisForImageTextRetrieval"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["blip-2-lavis"] = GENERATES
modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES["blip-2-lavis"] = RETRIEVES

OPT = {
    "model_type": "opt", "vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
CLIP, EVA = "clip_vision_model", "blip_2_vision_model"

ONE_OUTPUT = "BLIP-2 returns the outputs of each of its three models, and no states of its own"
NOT_FOR_BLIP_2 = {
    "test_attention_outputs": ONE_OUTPUT,
    "test_hidden_states_output": ONE_OUTPUT,
    "test_retain_grad_hidden_states_attentions": ONE_OUTPUT,
    "test_inputs_embeds": "the test takes the text away, in which the places of the image are",
    "test_eager_matches_sdpa_inference*": "the test gives a model its pictures alone; tests/modeling holds both "
    "implementations against each other",
    "test_model_base_model_prefix": "there is no model without a head below these",
    "test_generation_tester_mixin_inheritance": "the generation tests are not in transformers' source distribution: "
    "their mix-in is an empty one",
}
"""What transformers' BLIP-2, of which these are made, does not pass either, with the reason; `*` is any ending."""
NO_LOSS = "transformers' class for retrieval computes no loss"


class Blip2LavisModelTester:
    """A tiny BLIP-2 and inputs for it: places of the queries, then a text."""

    batch_size = 3
    seq_length = QUERIES + 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    text = OPT

    def __init__(self, parent, text=OPT, tower=EVA, reads_text=False):
        self.parent = parent
        self.text, self.tower, self.reads_text = text, tower, reads_text

    def get_config(self) -> Blip2LavisConfig:
        return Blip2LavisConfig(
            vision_config={
                "model_type": self.tower, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "initializer_range": 0.02,
            },
            qformer_config={
                "hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": 4,
                "intermediate_size": 40, "vocab_size": 99, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0, "use_qformer_text_input": self.reads_text,
            },
            text_config=dict(self.text), num_query_tokens=QUERIES, image_token_index=IMAGE, image_text_hidden_size=16,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], 90) + 4
        input_ids[:, :QUERIES] = IMAGE
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, 28, 28]),
        }
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = common.ids_tensor([self.batch_size, self.seq_length], 90) + 4
        return config, inputs

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


def skipped(names):
    """A class decorator: tests of these names (`*` is any ending) are skipped for the reason given."""

    def decorate(test_class):
        for name in dir(test_class):
            because = next((reason for pattern, reason in names.items() if fnmatchcase(name, pattern)), None)
            if because is not None:
                setattr(test_class, name, unittest.skip(because)(lambda self: None))
        return test_class

    return decorate


@skipped(NOT_FOR_BLIP_2)
class Blip2LavisModelTest(common.ModelTesterMixin, unittest.TestCase):
    """EVA's ViT-g with an epsilon of its own, and OPT."""

    all_model_classes = (Blip2LavisForConditionalGeneration,)
    _is_composite = True
    model_tester = None
    options: dict = {}

    def setUp(self):
        self.model_tester = Blip2LavisModelTester(self, **self.options)


class ClipBlip2LavisModelTest(Blip2LavisModelTest):
    """CLIP's ViT-L, and OPT."""

    options = {"tower": CLIP}


class T5Blip2LavisModelTest(Blip2LavisModelTest):
    """CLIP's ViT-L, and a T5 whose head is no embedding."""

    options = {"tower": CLIP, "text": T5}


@skipped({"test_training*": NO_LOSS, "test_enable_input_require_grads_with*": NO_LOSS})
class RetrievalBlip2LavisModelTest(Blip2LavisModelTest):
    """Image-text matching and contrast."""

    all_model_classes = (Blip2LavisForImageTextRetrieval,)
    options = {"tower": CLIP, "reads_text": True}
