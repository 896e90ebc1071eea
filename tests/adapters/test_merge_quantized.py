"""A 4-bit base's values: NormalFloat4 as bitsandbytes and the QLoRA paper define it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightport.adapters.merging.quantized import (
    BLOCK,
    NF4_LEVELS,
    SCALES_BLOCK,
    dynamic_levels,
    is_quantized_layer,
    nf4_round_trip,
)
from weightport.errors import UsageError


def test_levels_are_the_normal_quantiles_of_the_paper() -> None:
    # QLoRA, equation 4, with bitsandbytes' offset: 8 positive and 7 negative quantiles, and zero.
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels / levels.max(), rtol=0, atol=2e-7)


def test_dynamic_levels_are_those_of_bitsandbytes() -> None:
    levels = dynamic_levels()
    assert levels.shape == (256,) and bool((levels.diff() > 0).all())
    assert levels[-1] == 1 and levels[127] == 0
    # Its table ends and begins with these.
    torch.testing.assert_close(
        levels[-3:], torch.tensor([0.9789062738418579, 0.992968738079071, 1.0]), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(levels[:2], torch.tensor([-0.992968738079071, -0.9789062738418579]), rtol=0, atol=1e-7)


def one_by_one(weight: torch.Tensor, double: bool) -> torch.Tensor:
    """The same by nearest level, element by element in Python."""
    flat, out, scales = weight.flatten().float().tolist(), [], []
    for start in range(0, len(flat), BLOCK):
        scales.append(max(abs(value) for value in flat[start : start + BLOCK]))
    kept = list(scales)
    if double:
        offset = float(torch.tensor(scales).mean())
        levels = dynamic_levels().tolist()
        for start in range(0, len(scales), SCALES_BLOCK):
            centred = [scale - offset for scale in scales[start : start + SCALES_BLOCK]]
            outer = max(abs(value) for value in centred) or 1.0
            nearest = [min(levels, key=lambda level, v=value: abs(level - v / outer)) for value in centred]
            kept[start : start + SCALES_BLOCK] = [level * outer + offset for level in nearest]
    for place, value in enumerate(flat):
        scale = scales[place // BLOCK]
        level = min(NF4_LEVELS, key=lambda level, v=value, s=scale: abs(level - (v / s if s else 0.0)))
        out.append(level * kept[place // BLOCK])
    return torch.tensor(out).to(weight.dtype).view(weight.shape)


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_takes_the_nearest_level_of_each_block(dtype: torch.dtype, double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 48).mul_(torch.rand(70, 1)).to(dtype)
    weight[3] = 0
    weight.view(-1)[128:192] = 0
    torch.testing.assert_close(
        nf4_round_trip(weight, double=double),
        one_by_one(weight, double),
        rtol=1e-6 if dtype == torch.float32 else 0,
        atol=1e-7,
    )


def test_blocks_of_conv1d_run_along_the_inputs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 70)
    torch.testing.assert_close(nf4_round_trip(weight, flipped=True), one_by_one(weight.T.contiguous(), False).T)


def test_linear_layers_are_rounded_and_nothing_else() -> None:
    assert is_quantized_layer("model.layers.0.mlp.gate_proj.weight", (8, 8))
    assert is_quantized_layer("model.visual.blocks.0.attn.qkv.weight", (8, 8))
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "shared.weight",
        "transformer.wte.weight",
        "a.q_proj.bias",
        "model.decoder.token_rel_pos_tables.0.weight",
    ):
        assert not is_quantized_layer(name, (8, 8))
    assert not is_quantized_layer("model.norm.weight", (8,))


def test_merge_into_a_4_bit_base_adds_to_the_rounded_values(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig
    from tiny_models import write_adapter, write_base

    from weightport.adapters.merging.merge import MergeOptions
    from weightport.api import merge_lora

    base = write_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    out = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(quantized_base="nf4")).directory
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    pair = load_file(adapter / "adapter_model.safetensors")
    q = "model.layers.0.self_attn.q_proj"
    change = 2.0 * pair[f"base_model.model.{q}.lora_B.weight"] @ pair[f"base_model.model.{q}.lora_A.weight"]
    expected = (nf4_round_trip(before[f"{q}.weight"]).float() + change).bfloat16()
    assert torch.equal(after[f"{q}.weight"], expected)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[untouched], nf4_round_trip(before[untouched]))
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_layers_that_the_training_recorded_are_rounded_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig
    from tiny_models import write_adapter, write_base

    from weightport.adapters.base.base_record import Quantization, record_base
    from weightport.adapters.merging.merge import MergeOptions, Written
    from weightport.adapters.verification.verify import verify_merge
    from weightport.api import merge_lora

    base = write_base("llama", tmp_path / "base", torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    layer = "model.layers.1.mlp.up_proj"
    record_base(adapter, base, Quantization("nf4-double", frozenset({layer})))
    checked = []

    def check(written: Written) -> None:
        checked.append(verify_merge(written))

    options = MergeOptions(quantized_base="nf4-double")
    out = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", options, check=check).directory
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} | {f"{layer}.weight"}
    assert torch.equal(after[f"{layer}.weight"], nf4_round_trip(before[f"{layer}.weight"], double=True))
    assert checked, "peft did not see the merge"
    with pytest.raises(UsageError, match="trained on a base in nf4-double"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "other", MergeOptions(quantized_base="nf4"))
