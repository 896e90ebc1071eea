"""What peft puts into LoRA adapters of unusual layers: MultiheadAttention, blocks on a diagonal, convolutions in
groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("peft")

from matrix import distance, merged_by_peft, write_model
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from test_merge_proof import merged
from tiny_models import load, write_adapter

from weightport.api import merge_lora
from weightport.errors import AdapterError


def siglip(folder: Path) -> Path:
    """A vision tower whose pooling head is torch's MultiheadAttention."""
    torch.manual_seed(2)
    config = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_use_head=True,
    )
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    return folder


def agree(base: Path, config: LoraConfig, folder: Path) -> dict[str, Any]:
    adapter = write_adapter(base, folder / "adapter", config)
    weights, model = merged(base, adapter, folder / "out")
    assert weights.compared == weights.changed == model.changed == model.weights > 1 and not model.unchecked
    assert model.seams and weights.furthest <= 1
    found = load(folder / "out").state_dict()
    assert distance(found, merged_by_peft(base, adapter), torch.float32) < 0.55
    record: dict[str, Any] = json.loads((folder / "out" / "merge.json").read_text())
    return record


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"attention": 2}, "alpha_pattern": {"attention": 6}}])
def test_multihead_attention_is_merged_as_peft_trains_it(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["head.attention", "q_proj"], **settings)
    record = agree(siglip(tmp_path / "base"), config, tmp_path)
    assert any("out_proj twice" in note for note in record["notes"])


def test_multihead_attention_without_the_pair_of_its_out_proj_is_refused(tmp_path: Path) -> None:
    base = siglip(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["head.attention"]))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "out_proj" not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="incomplete, it has no pair for its out_proj"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")


@pytest.mark.parametrize("side", ["a", "b"])
def test_blocks_on_a_diagonal_are_merged(side: str, tmp_path: Path) -> None:
    blocks = BdLoraConfig(**{f"target_modules_bd_{side}": ["q_proj", "down_proj"]}, nblocks=2, match_strict=False)
    base = write_model("llama", tmp_path / "base")
    agree(base, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], use_bdlora=blocks), tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nblocks": 0, "target_modules_bd_a": ["q_proj"]}, "says not which"),
        ({"nblocks": 3, "target_modules_bd_a": ["q_proj"]}, "no row of 3 blocks"),
        ({"nblocks": 4, "target_modules_bd_a": ["q_proj"]}, "another base"),
        ({"nblocks": 2, "target_modules_bd_b": ["q_proj"]}, "no pair of low rank"),
        ({"nblocks": 2, "target_modules_bd_a": 7}, "expected parts of module names"),
        ([1], "use_bdlora is"),
    ],
)
def test_blocks_that_the_settings_do_not_describe_are_refused(settings: Any, said: str, tmp_path: Path) -> None:
    base = write_model("llama", tmp_path / "base")
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], use_bdlora=blocks))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_bdlora": settings}))
    with pytest.raises(AdapterError, match=said):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_velora_keeps_for_training_changes_nothing(tmp_path: Path) -> None:
    base = write_model("llama", tmp_path / "base")
    velora = VeloraConfig(num_groups=2, init_type="random")
    agree(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], velora_config=velora), tmp_path)


def test_pair_beside_a_convolution_in_groups_is_refused_with_its_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("conv", torch.nn.Conv2d(8, 8, 3, groups=4))
    base = tmp_path / "base"
    base.mkdir()
    save_file(dict(model.state_dict()), base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "custom"}')
    from peft import get_peft_model

    get_peft_model(model, LoraConfig(r=4, target_modules=["conv"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"a dense convolution .* beside one in groups"):
        merge_lora(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_layer_within_a_module_whose_parameter_has_a_pair_is_added_once(tmp_path: Path) -> None:
    """peft's wrapper of a parameter stands in the name too, and adds nothing twice."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(6, 5))
            self.out_proj = torch.nn.Linear(5, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out_proj(x) @ self.table

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("block", Scaled())
    base = tmp_path / "base"
    base.mkdir()
    save_file(dict(model.state_dict()), base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "custom"}')
    from peft import get_peft_model

    config = LoraConfig(r=2, target_modules=["out_proj"], target_parameters=["block.table"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.block.base_layer.out_proj.lora_{side}.weight"].double() for side in "AB")
    out = merge_lora(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").directory
    before, after = (load_file(f / "model.safetensors")["block.out_proj.weight"].double() for f in (base, out))
    torch.testing.assert_close(after - before, config.lora_alpha / config.r * (b @ a), rtol=1e-5, atol=1e-6)
