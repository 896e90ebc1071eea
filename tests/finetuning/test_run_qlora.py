"""Training beside a base in 4 bits, where bitsandbytes is installed: it runs on a CPU too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import run
from transformers import AutoConfig, AutoModelForImageTextToText

from weightport.adapters import MergeOptions
from weightport.adapters.base.base_record import recorded_quantization
from weightport.api import merge_lora
from weightport.errors import UsageError
from weightport.families.registry import registry
from weightport.finetuning.evaluation.evaluate import evaluate
from weightport.finetuning.recipes.recipe import load_recipe, with_settings
from weightport.finetuning.setup.preparing import resolved

pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes", exc_type=ImportError)

SETTINGS = {
    "batch.image_size": 64,
    "model.method": "qlora",
    "model.freeze": [],
    "training.learning_rate": 5e-3,
    "training.warmup_steps": 0,
    "training.max_steps": 40,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.dataloader_num_workers": 0,
    "evaluation.metrics": ["rouge-l"],
    "evaluation.generation.max_new_tokens": 12,
}


def without_records(model: Path, folder: Path) -> Path:
    """A copy whose weights may be replaced: no record speaks of them."""
    ignored = shutil.ignore_patterns(".weightport.json", "conversion.json")
    return Path(shutil.copytree(model, folder, ignore=ignored))


@pytest.fixture
def even(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose matrices have rows of whole blocks of 64: bitsandbytes' kernels for CPUs know no others."""
    folder = without_records(tiny("ofa-cn"), tmp_path / "base")
    config = AutoConfig.from_pretrained(folder)
    config.encoder_ffn_dim = config.decoder_ffn_dim = 128
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_merge_into_the_4_bit_base_is_the_model_that_was_measured(even: Path, muge: Path, tmp_path: Path) -> None:
    out = run(even, "muge-caption", muge, tmp_path / "run", eval_data=muge, more=SETTINGS)
    held = recorded_quantization(out.directory)
    assert held is not None and held.kind == "nf4-double"
    assert "model.decoder.layers.0.fc1" in held.layers
    assert not any("vision_tower" in layer or "image_proj" in layer or "tables" in layer for layer in held.layers)

    with pytest.raises(UsageError, match="nf4-double"):
        merge_lora(even, [(out.directory, 1.0)], tmp_path / "other", MergeOptions(quantized_base="nf4"))
    merge_lora(even, [(out.directory, 1.0)], tmp_path / "merged", MergeOptions(quantized_base="nf4-double"))
    recipe, _ = resolved(load_recipe("muge-caption"), "ofa", as_published=False)
    measured = evaluate(
        tmp_path / "merged", registry()["ofa"].training, str(muge), with_settings(recipe, SETTINGS, "here")
    ).metrics
    assert out.metrics["rouge-l"] > 0.2, "nothing was learned"
    assert measured["rouge-l"] == pytest.approx(out.metrics["rouge-l"], abs=0.05)


@pytest.fixture
def even_paligemma(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """PaliGemma whose language model has matrices of whole blocks of 64."""
    folder = without_records(tiny("paligemma2"), tmp_path / "base")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.hidden_size = config.projection_dim = config.vision_config.projection_dim = 64
    config.text_config.intermediate_size, config.text_config.head_dim = 128, 32
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As large as trained ones: freshly drawn, the pictures would hardly show in the logits.
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def test_json_extract_learns_beside_a_language_model_in_4_bits(
    even_paligemma: Path, receipts: str, tmp_path: Path
) -> None:
    more = {
        **SETTINGS, "model.freeze": ["vision", "projector"], "evaluation.metrics": ["json-f1", "json-valid"],
        "evaluation.generation.max_new_tokens": 128, "training.max_steps": 200, "training.learning_rate": 1e-2,
        "training.lr_scheduler_type": "constant", "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
    }  # fmt: skip
    del more["batch.image_size"]
    out = run(even_paligemma, "json-extract", receipts, tmp_path / "run", eval_data=receipts, more=more)
    held = recorded_quantization(out.directory)
    assert held is not None and held.kind == "nf4-double"
    layers = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
    wanted = {f"model.language_model.layers.{layer}.{name}" for layer in range(4) for name in layers}
    assert held.layers == wanted, "the image tower, the projector and the head stay as they are"
    assert out.metrics["json-f1"] > 0.9, "nothing was learned"
    merge_lora(even_paligemma, [(out.directory, 1.0)], tmp_path / "merged", MergeOptions(quantized_base="nf4-double"))
    recipe = with_settings(resolved(load_recipe("json-extract"), "paligemma2", as_published=False)[0], more, "here")
    measured = evaluate(tmp_path / "merged", registry()["paligemma2"].training, receipts, recipe).metrics
    assert measured["json-f1"] == pytest.approx(out.metrics["json-f1"], abs=0.1)


@pytest.fixture
def even_blip2(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """BLIP-2 whose language model has matrices of whole blocks of 64."""
    folder = without_records(tiny("blip2"), tmp_path / "base")
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size = text.word_embed_proj_dim = 64
    text.ffn_dim, text.dropout = 128, 0.0
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def test_lora_caption_learns_beside_a_language_model_in_4_bits(even_blip2: Path, pairs: Path, tmp_path: Path) -> None:
    more = {
        **SETTINGS, "model.freeze": ["vision", "bridge"], "evaluation.metrics": ["rouge-l"],
        "training.max_steps": 200, "training.learning_rate": 1e-2, "training.per_device_train_batch_size": 4,
        "lora.lora_dropout": 0.0, "training.bf16": False,
    }  # fmt: skip
    del more["batch.image_size"]
    out = run(even_blip2, "lora-caption", pairs, tmp_path / "run", eval_data=pairs, more=more)
    held = recorded_quantization(out.directory)
    assert held is not None and held.kind == "nf4-double"
    parts = [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "fc1", "fc2"]
    layers = {f"language_model.model.decoder.layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    assert held.layers == layers, "vision encoder, Q-Former and projection stay as they are"
    assert out.metrics["rouge-l"] > 0.9, "nothing was learned"
    merge_lora(even_blip2, [(out.directory, 1.0)], tmp_path / "merged", MergeOptions(quantized_base="nf4-double"))
    recipe = with_settings(resolved(load_recipe("lora-caption"), "blip2", as_published=False)[0], more, "here")
    measured = evaluate(tmp_path / "merged", registry()["blip2"].training, str(pairs), recipe).metrics
    assert measured["rouge-l"] == pytest.approx(out.metrics["rouge-l"], abs=0.1)
