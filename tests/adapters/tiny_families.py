"""Tiny random models whose names on disk are not the names in memory: vision-language models, mixtures of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from safetensors.torch import load_file, save_file

V, D, L = 96, 32, 2
IMAGE = 90

_TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _paligemma() -> Any:
    return tr.PaliGemmaForConditionalGeneration(
        tr.PaliGemmaConfig(
            text_config={**_TEXT, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1},
            vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            projection_dim=D,
            hidden_size=D,
            image_token_index=IMAGE,
        )
    )


def _llava() -> Any:
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(
            text_config={**_TEXT, "model_type": "llama"},
            vision_config={**_VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=IMAGE,
        )
    )


def _qwen2_vl() -> Any:
    return tr.Qwen2VLForConditionalGeneration(
        tr.Qwen2VLConfig(
            text_config={
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            },
            vision_config={"embed_dim": 16, "depth": L, "num_heads": 2, "hidden_size": D, "patch_size": 4},
            image_token_id=IMAGE,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
    )


def _internvl() -> Any:
    return tr.InternVLForConditionalGeneration(
        tr.InternVLConfig(
            text_config={**_TEXT, "model_type": "qwen2"},
            vision_config={
                **_VISION,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "model_type": "internvl_vision",
            },
            image_token_id=IMAGE,
        )
    )


def _blip2() -> Any:
    return tr.Blip2ForConditionalGeneration(
        tr.Blip2Config(
            vision_config=_VISION,
            qformer_config={
                "vocab_size": V,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": L,
                "num_attention_heads": 2,
                "encoder_hidden_size": 16,
                "cross_attention_frequency": 1,
            },
            text_config={
                "model_type": "opt",
                "vocab_size": V,
                "hidden_size": D,
                "word_embed_proj_dim": D,
                "ffn_dim": 48,
                "num_hidden_layers": L,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def _florence2() -> Any:
    return tr.Florence2ForConditionalGeneration(
        tr.Florence2Config(
            text_config={
                "model_type": "bart",
                "vocab_size": V,
                "d_model": D,
                "encoder_layers": L,
                "decoder_layers": L,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "max_position_embeddings": 64,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
            },
            vision_config={
                "embed_dim": (8, 16, 16, 16),
                "depths": (1, 1, 1, 1),
                "num_heads": (2, 2, 2, 2),
                "num_groups": (2, 2, 2, 2),
                "window_size": 4,
                "projection_dim": D,
            },
            image_token_id=IMAGE,
        )
    )


def _mixtral() -> Any:
    return tr.MixtralForCausalLM(
        tr.MixtralConfig(**{**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8})
    )


def _qwen3_moe() -> Any:
    return tr.Qwen3MoeForCausalLM(
        tr.Qwen3MoeConfig(
            **{
                **_TEXT,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "decoder_sparse_step": 1,
                "head_dim": 8,
            }
        )
    )


def _llama_tied() -> Any:
    return tr.LlamaForCausalLM(tr.LlamaConfig(**_TEXT, tie_word_embeddings=True))


def _vision_encoder_decoder() -> Any:
    return tr.VisionEncoderDecoderModel(
        tr.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            tr.ViTConfig(**_VISION),
            tr.GPT2Config(
                vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=64, add_cross_attention=True, is_decoder=True
            ),
            decoder_start_token_id=1,
            pad_token_id=0,
        )
    )


def _mllama() -> Any:
    return tr.MllamaForConditionalGeneration(
        tr.MllamaConfig(
            text_config={
                **_TEXT,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            vision_config={
                "hidden_size": 16,
                "attention_heads": 2,
                "intermediate_size": 24,
                "num_hidden_layers": L,
                "num_global_layers": 1,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [1],
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            image_token_index=IMAGE,
        )
    )


def _vit() -> Any:
    return tr.ViTForImageClassification(tr.ViTConfig(**_VISION, num_labels=3))


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "paligemma": _paligemma,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "internvl": _internvl,
    "blip2": _blip2,
    "florence2": _florence2,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "llama_tied": _llama_tied,
    "vision_encoder_decoder": _vision_encoder_decoder,
    "mllama": _mllama,
    "vit": _vit,
}

# What the Hub's repositories call tensors that a fresh model, saved today, calls otherwise: pattern, replacement.
HUB_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "paligemma": ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    "llava": ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
}


def rename_stored(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the tensors of a directory's one file other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def to_hub_names(name: str, folder: Path) -> None:
    """Rename a saved model's tensors as the Hub's repositories have them."""
    for pattern, replacement in HUB_NAMES[name]:
        rename_stored(folder, partial(re.sub, pattern, replacement))


def randomised(model: torch.nn.Module) -> None:
    """Every weight random, norms and biases too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
