"""Merged models hold what base and adapter give in peft, at least as close to the float64 truth as peft's own
merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import applied, load, logits, merged_by_peft, write_adapter, write_base

from weightport.adapters.merging.merge import MergeOptions
from weightport.api import merge_lora

ATTENTION = {
    "opt": ["q_proj", "v_proj", "fc1"],
    "llama": ["q_proj", "k_proj", "o_proj", "down_proj"],
    "gemma": ["q_proj", "v_proj", "gate_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "bart": ["q_proj", "fc2"],
    "resnet": ["convolution"],
}


def config(name: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ATTENTION.get(name), **settings})


def merge(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    return merge_lora(base, [(adapter, 1.0)], out, MergeOptions(**options)).directory


def assert_true(base: Path, adapter: Path, merged: Path, *, change: Any = None) -> None:
    """The merged model against float64: weights no further off than peft's, logits within the weights' rounding."""
    written = load_file(merged / "model.safetensors")
    truth = merged_by_peft(base, adapter, torch.float64, change=change)
    peft = merged_by_peft(base, adapter, None, change=change)
    for name, weight in written.items():
        error = (weight.double() - truth[name]).abs().max()
        assert error <= (peft[name].to(weight.dtype).double() - truth[name]).abs().max(), name
    model = load(merged)
    expected = logits(applied(base, adapter, torch.float64, change=change))
    rounding = torch.finfo(model.dtype).eps * 60
    torch.testing.assert_close(
        logits(model.double()), expected, rtol=rounding, atol=rounding * float(expected.abs().max())
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float16) for name in ATTENTION),
        ("llama", torch.bfloat16),
        ("t5", torch.bfloat16),
        ("opt", torch.float32),
        ("bert", torch.float32),
    ],
    ids=str,
)
def test_merged_model_is_base_with_adapter(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(name, tmp_path / "base", dtype)
    adapter = write_adapter(base, tmp_path / "adapter", config(name, fan_in_fan_out=name == "gpt2"))
    assert_true(base, adapter, merge(base, adapter, tmp_path / "out"))


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "rank-and-alpha-patterns": (
        "llama",
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.0\..*o_proj": 5}},
    ),
    "rank-patterns-rank-stabilised": ("llama", {"rank_pattern": {"q_proj": 8}, "use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora-conv1d": ("gpt2", {"use_dora": True, "fan_in_fan_out": True}),
    "dora-convolution": ("resnet", {"use_dora": True}),
    "dora-embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "bias-all": ("opt", {"bias": "all"}),
    "bias-lora-only": ("opt", {"bias": "lora_only"}),
    "bias-of-lora-B": ("opt", {"lora_bias": True}),
    "modules-to-save": ("opt", {"modules_to_save": ["fc2", "final_layer_norm"]}),
    "modules-to-save-head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "one-layer": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "regular-expression": ("llama", {"target_modules": r".*\.1\..*(q|k)_proj"}),
    "all-linear": ("bart", {"target_modules": "all-linear"}),
    "excluded": ("llama", {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "trained-tokens": ("llama", {"trainable_token_indices": [3, 90]}),
    "trained-tokens-tied": ("gemma", {"trainable_token_indices": [3, 90]}),
    "parameters-of-experts": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "parameter-of-a-linear-layer": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_everything_that_peft_puts_into_an_adapter_is_merged(setting: str, tmp_path: Path) -> None:
    name, settings = SETTINGS[setting]
    base = write_base(name, tmp_path / "base", torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter", config(name, **settings))
    assert_true(base, adapter, merge(base, adapter, tmp_path / "out"))
