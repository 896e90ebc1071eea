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


@pytest.fixture
def even(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose matrices have rows of whole blocks of 64: bitsandbytes' kernels for CPUs know no others."""
    folder = shutil.copytree(tiny("ofa-cn"), tmp_path / "base")
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
