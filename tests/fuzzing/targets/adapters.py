"""The reader of LoRA adapters, held against safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.same import require_tensor
from fuzzing.targets.changes import change
from weightport.adapters.reading.lora_tensors import LoraAdapter, open_adapter

SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none",
    "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "base_model_name_or_path": "some/model",
    "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.q_proj": 2}, "alpha_pattern": {"v_proj": 4},
    "layers_to_transform": None, "layers_pattern": None, "modules_to_save": ["norm"], "inference_mode": True,
    "init_lora_weights": True, "trainable_token_indices": None, "exclude_modules": None, "revision": None,
}  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for layer, rank in ((0, 4), (1, 2)):
        prefix = f"base_model.model.model.layers.{layer}"
        found |= {
            f"{prefix}.q_proj.lora_A.weight": torch.randn(rank, 6),
            f"{prefix}.q_proj.lora_B.weight": torch.ones(5, rank),
        }
        found |= {
            f"{prefix}.v_proj.lora_A.weight": torch.randn(4, 6),
            f"{prefix}.v_proj.lora_B.weight": torch.ones(5, 4),
        }
    return found | {"base_model.model.model.norm.weight": torch.ones(6)}


def _seeds(folder: Path) -> list[Case]:
    torch.manual_seed(1)
    tensors = _tensors()
    pattern = {**SETTINGS, "target_modules": r".*\.(q|v)_proj", "use_rslora": True}
    dora = {**SETTINGS, "use_dora": True, "rank_pattern": {}}
    magnitudes = {
        name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(5) for name in tensors if "lora_A" in name
    }
    return [
        {
            "adapter_config.json": json.dumps(settings).encode(),
            "adapter_model.safetensors": safetensors.torch.save(content),
        }
        for settings, content in ((SETTINGS, tensors), (pattern, tensors), (dora, tensors | magnitudes))
    ]


def _as_safetensors(folder: Path, adapter: LoraAdapter) -> bool:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return False
    theirs = safetensors.torch.load(path.read_bytes())
    if not all(name.isprintable() for name in theirs):
        return False
    refs = [ref for module in adapter.modules for ref in (module.a, module.b)] + list(adapter.whole.values())
    for ref in refs:
        if ref.name not in theirs:
            raise MismatchError(f"names: {ref.name} is in no file")
        require_tensor(ref.name, ref.read(), theirs[ref.name])
    for module in adapter.modules:
        adapter.settings.scaling(module.module)
        adapter.settings.targets(module.module)
    return True


TARGETS = (Target("adapter", _seeds, change, open_adapter, _as_safetensors, ("adapters/reading", "checkpoints/")),)
