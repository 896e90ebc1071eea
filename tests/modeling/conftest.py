"""A tiny OFA whose every weight is random, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from weightport.modeling.ofa.configuration_ofa import OFAConfig
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

TINY = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 40,
    "decoder_max_position_embeddings": 40,
    "token_bucket_size": 8,
    "image_bucket_size": 4,
    "code_image_size": 16,
    "vision_config": {"depths": [1, 1, 1], "embedding_size": 4, "hidden_sizes": [4, 8, 12]},
}


@pytest.fixture
def make_model() -> Callable[..., OFAForConditionalGeneration]:
    """Builds a tiny model in evaluation mode, eager, with options over `TINY`."""

    def make(attn_implementation: str = "eager", **options) -> OFAForConditionalGeneration:
        torch.manual_seed(0)
        model = OFAForConditionalGeneration(OFAConfig(**{**TINY, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                # Ones and zeros, which most scales and tables start with, would hide where they are used.
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.mean() > 0.9))
        model.set_attn_implementation(attn_implementation)
        return model.eval()

    return make


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two samples: images of 2 x 3 patches, texts of 5 and 3 tokens, targets of 4 tokens."""
    pixels = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": torch.tensor([[0, 10, 11, 12, 2], [0, 13, 2, 1, 1]]),
        "pixel_values": pixels,
        "patch_masks": torch.tensor([True, True]),
        "decoder_input_ids": torch.tensor([[0, 20, 21, 22], [0, 23, 24, 25]]),
    }
