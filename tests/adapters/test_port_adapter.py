"""Ported adapters against the original's weights merged by hand; what cannot be carried is refused by name."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "converters"))

from florence2_checkpoints import HEAD, originals

from weightport.adapters import untie_head
from weightport.api import convert, load_native, merge_lora, port_adapter
from weightport.converters.low_rank_pair import LowRankPair
from weightport.converters.operations import Concatenate, Permute, Split
from weightport.errors import AdapterError

peft = pytest.importorskip("peft")

CONV = "vision_tower.convs.1.proj"
QKV = "vision_tower.blocks.2.1.spatial_block.window_attn.fn.qkv"
FC2 = "vision_tower.blocks.0.0.channel_block.ffn.fn.net.fc2"
OUT = "language_model.model.decoder.layers.1.encoder_attn.out_proj"
LM_HEAD = "language_model.lm_head"
NORM = "image_proj_norm"
RANKS = {CONV: 3, QKV: 4, FC2: 4, OUT: 2, LM_HEAD: 4}
ALPHAS = {CONV: 6, QKV: 1, FC2: 6, OUT: 6, LM_HEAD: 6}
SETTINGS = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none", "use_rslora": True,
    "base_model_name_or_path": "microsoft/Florence-2-base-ft", "revision": "refs/pr/6",
    "target_modules": r".*(convs\.1\.proj|2\.1\.spatial_block\..*qkv|0\.0\.channel_block\..*fc2|lm_head|out_proj)",
    "rank_pattern": {"convs.1.proj": 3, "encoder_attn.out_proj": 2}, "alpha_pattern": {"qkv": 1},
    "layers_pattern": None, "modules_to_save": [NORM], "inference_mode": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    original = originals(tmp_path_factory)("tiny-main")
    state = {name: tensor.double() for name, tensor in original.state().items()}
    original.folder = original.write(tmp_path_factory.mktemp("double"), state)
    return original


def pair(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, into, *kernel = weight.shape
    generator = torch.Generator().manual_seed(out * into)
    a = torch.randn(rank, into, *kernel, generator=generator, dtype=torch.float64) / into
    return a, torch.randn(out, rank, *(1 for _ in kernel), generator=generator, dtype=torch.float64)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], settings: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings or SETTINGS))
    return folder


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """(adapter folder, the original's state dict with it merged by hand)."""
    state = torch.load(source.folder / "pytorch_model.bin", weights_only=True)
    tensors = {}
    for module, rank in RANKS.items():
        a, b = pair(state[f"{module}.weight"], rank)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        product = torch.einsum("or...,ri...->oi...", b, a)
        state[f"{module}.weight"] = state[f"{module}.weight"] + ALPHAS[module] / rank**0.5 * product
    for leaf in ("weight", "bias"):
        tensors[f"{NORM}.{leaf}"] = state[f"{NORM}.{leaf}"] = state[f"{NORM}.{leaf}"] * 1.25
    return write_adapter(tmp_path_factory.mktemp("adapter"), tensors), state


@pytest.fixture(scope="module", params=["reuse", "append"])
def base(request, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "native"
    return convert(source.folder, out, None, image_token=request.param).directory


def logits(model, rows: int = 1381) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    image = model.config.image_token_id
    prompt = torch.tensor([[image] * 10 + [0, 80, 72, 85, 97, 2]])
    pixels = torch.randn(1, 3, 96, 96, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        out = model(
            input_ids=prompt, pixel_values=pixels, decoder_input_ids=torch.tensor([[2, 0, 5, 7]]), use_cache=False
        )
    return out.logits[..., :rows]


def apply(base: Path, adapter: Path, untied: bool = False):
    model = load_native(base, torch.float64)
    return peft.PeftModel.from_pretrained(untie_head(model) if untied else model, adapter).double().eval()


def test_ported_adapter_computes_what_the_merged_original_does_at_each_step(source, trained, base, tmp_path):
    adapter, state = trained
    expected_base = convert(source.write(tmp_path / "in", state), tmp_path / "merged").directory
    expected = logits(load_native(expected_base, torch.float64))
    ported = port_adapter(adapter, tmp_path / "ported", base)
    before = logits(load_native(base, torch.float64))
    assert not torch.allclose(before, expected, atol=1e-2), "the adapter changes nothing, so this test proves nothing"
    torch.testing.assert_close(logits(apply(base, ported.directory)), expected, rtol=0, atol=1e-10)
    merged = apply(base, ported.directory, untied=True).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-10)
    merged.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_native(tmp_path / "saved", torch.float64)), expected, rtol=0, atol=1e-10)


def test_settings_name_every_module_in_full_and_nothing_else(trained, base, tmp_path):
    ported = port_adapter(trained[0], tmp_path / "ported", base)
    settings = json.loads((ported.directory / "adapter_config.json").read_text())
    native = {natives[0] for natives in ported.modules.values()}
    assert set(settings["target_modules"]) == native
    assert "lm_head" in native and "model.vision_tower.convs.1.conv" in native
    assert settings["modules_to_save"] == ["model.multi_modal_projector.image_proj_norm"]
    assert sorted(settings["rank_pattern"].values()) == [2, 3] and list(settings["alpha_pattern"].values()) == [1]
    assert settings["revision"] is None and settings["task_type"] == "CAUSAL_LM"
    assert settings["base_model_name_or_path"] == str(base)
    assert any("untied" in note for note in ported.notes), "a tied base needs its head untied before a merge"


def test_vocabulary_that_grew_gets_rows_of_zeros_in_the_heads_adapter(source, trained, tmp_path):
    native = convert(source.folder, tmp_path / "native", None, image_token="append").directory
    ported = port_adapter(trained[0], tmp_path / "ported", native).directory
    b = load_file(ported / "adapter_model.safetensors")["base_model.model.lm_head.lora_B.weight"]
    own = load_file(trained[0] / "adapter_model.safetensors")[f"base_model.model.{LM_HEAD}.lora_B.weight"]
    assert torch.equal(b[: own.shape[0]], own) and not b[own.shape[0] :].any() and b.shape[0] % 64 == 0


def test_original_and_converted_base_give_the_same_adapter(source, trained, tmp_path):
    # With as many rows as the original: the head's adapter has them too.
    base = convert(source.folder, tmp_path / "native", None, image_token="reuse").directory
    first = port_adapter(trained[0], tmp_path / "a", base).directory
    second = port_adapter(trained[0], tmp_path / "b", source.folder).directory
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()


def with_dora(state: dict[str, torch.Tensor], modules: list[str]) -> tuple[dict, dict]:
    """(a DoRA adapter with biases of B, the original's state dict with it merged by hand)."""
    tensors, merged = {}, dict(state)
    for module in modules:
        rank = RANKS[module]
        weight = state[f"{module}.weight"]
        a, b = pair(weight, rank)
        changed = weight + ALPHAS[module] / rank**0.5 * torch.einsum("or...,ri...->oi...", b, a)
        per_output = (-1, *(1 for _ in weight.shape[1:]))
        lengths = changed.flatten(1).norm(dim=1).view(per_output)
        magnitude = weight.flatten(1).norm(dim=1) * torch.linspace(0.5, 2, len(weight), dtype=torch.float64)
        merged[f"{module}.weight"] = changed / lengths * magnitude.view(per_output)
        stored = magnitude if weight.ndim == 2 else magnitude.view(1, -1, 1, 1)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        tensors[f"{module}.lora_magnitude_vector"] = stored
    return tensors, merged


def test_magnitudes_of_dora_go_where_the_rows_of_their_weights_go(source, base, tmp_path):
    state = torch.load(source.folder / "pytorch_model.bin", weights_only=True)
    tensors, merged = with_dora(state, [CONV, QKV, FC2, OUT])
    adapter = write_adapter(
        tmp_path / "adapter", tensors, {**SETTINGS, "modules_to_save": None, "use_dora": True, "bias": "none"}
    )
    ported = port_adapter(adapter, tmp_path / "ported", base)
    expected = logits(load_native(convert(source.write(tmp_path / "in", merged), tmp_path / "merged").directory))
    found = logits(apply(base, ported.directory))
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-10)
    files = merge_lora(base, [(adapter, 1.0)], tmp_path / "files").directory
    torch.testing.assert_close(logits(load_native(files, torch.float64)), found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_go_along_beside_pairs_and_elsewhere(bias, source, base, tmp_path):
    state = torch.load(source.folder / "pytorch_model.bin", weights_only=True)
    tensors, merged = {}, dict(state)
    for module in (QKV, FC2):
        a, b = pair(state[f"{module}.weight"], RANKS[module])
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        scale = ALPHAS[module] / RANKS[module] ** 0.5
        merged[f"{module}.weight"] = state[f"{module}.weight"] + scale * b @ a
    for name in [name for name in state if name.endswith(".bias")]:
        module = name.removesuffix(".bias")
        if bias == "all" or module in (QKV, FC2):
            merged[name] = state[name] + torch.linspace(-1, 1, state[name].numel(), dtype=torch.float64)
            tensors[f"{module}.base_layer.bias" if module in (QKV, FC2) else name] = merged[name]
    adapter = write_adapter(tmp_path / "adapter", tensors, {**SETTINGS, "modules_to_save": None, "bias": bias})
    ported = port_adapter(adapter, tmp_path / "ported", base)
    expected = logits(load_native(convert(source.write(tmp_path / "in", merged), tmp_path / "merged").directory))
    torch.testing.assert_close(logits(apply(base, ported.directory)), expected.double(), rtol=0, atol=1e-10)
    files = merge_lora(base, [(adapter, 1.0)], tmp_path / "files").directory
    torch.testing.assert_close(logits(load_native(files, torch.float64)), expected.double(), rtol=0, atol=1e-10)


def test_dora_on_a_head_that_grows_by_rows_of_zeros_is_refused(source, tmp_path):
    native = convert(source.folder, tmp_path / "native", None, image_token="append").directory
    state = torch.load(source.folder / "pytorch_model.bin", weights_only=True)
    tensors, _ = with_dora({f"{LM_HEAD}.weight": state[HEAD]}, [LM_HEAD])
    settings = {**SETTINGS, "modules_to_save": None, "use_dora": True}
    with pytest.raises(AdapterError, match=f"{LM_HEAD}: the native model has rows of zeros .* DoRA divides"):
        port_adapter(write_adapter(tmp_path / "adapter", tensors, settings), tmp_path / "out", native)
    assert not (tmp_path / "out").exists()


def dora(weight: torch.Tensor, part: LowRankPair) -> tuple[torch.Tensor, torch.Tensor]:
    changed = weight + part.b @ part.a
    return changed / changed.norm(dim=1, keepdim=True) * part.magnitude.view(-1, 1), part.bias


def test_fused_matrix_splits_by_rows_with_its_magnitudes_and_bias():
    generator = torch.Generator().manual_seed(0)
    sizes = {"weight": (12, 5), "a": (2, 5), "b": (12, 2), "magnitude": (12,), "bias": (12,)}
    t = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    fused = LowRankPair(t["a"], t["b"], t["magnitude"], t["bias"])
    parts = Split(3).pairs(fused)
    assert len(parts) == 3
    found = [dora(weight, part) for weight, part in zip(t["weight"].chunk(3), parts)]
    weight, bias = dora(t["weight"], fused)
    torch.testing.assert_close(torch.cat([w for w, _ in found]), weight, rtol=0, atol=1e-14)
    assert torch.equal(torch.cat([b for _, b in found]), bias)


@pytest.mark.parametrize("operation", [Permute((1, 0, 2)), Split(2, dim=1), Concatenate(2)], ids=lambda o: o.name)
def test_weights_that_a_pair_cannot_follow_are_refused_with_what_happens_to_them(operation):
    with pytest.raises(AdapterError, match=re.escape(f"goes through '{operation.name}'")):
        operation.pairs(LowRankPair(torch.ones(2, 4), torch.ones(4, 2)))


def refused(tmp_path: Path, source, tensors, text: str, **settings) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors, {**SETTINGS, "modules_to_save": None, **settings})
    with pytest.raises(AdapterError, match=text):
        port_adapter(adapter, tmp_path / "out", source.folder)
    assert not (tmp_path / "out").exists()


def matrices(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b)}


def test_depthwise_convolutions_are_refused_by_name(source, tmp_path):
    module = "vision_tower.blocks.0.0.spatial_block.conv1.fn.dw"
    refused(tmp_path, source, matrices(module, (4, 8, 3, 3), (8, 4, 1, 1)), f"{module}: a dense low-rank convolution")


def test_adapter_of_another_base_is_refused(source, tmp_path):
    refused(tmp_path, source, matrices(FC2, (4, 512), (128, 4)), f"{FC2}: the pair gives .* another base")
    deep = "language_model.model.decoder.layers.11.fc1"
    refused(tmp_path, source, matrices(deep, (4, 32), (64, 4)), f"{deep}: would be .* another base")
    refused(
        tmp_path, source, matrices("text_model.fc1", (4, 32), (64, 4)), "text_model.fc1: is no module of Florence-2"
    )


def test_adapter_that_is_native_already_is_refused(source, tmp_path):
    module = "model.language_model.decoder.layers.0.fc1"
    refused(tmp_path, source, matrices(module, (4, 32), (64, 4)), "has a native name already")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"peft_type": "LOHA"}, "of the kind 'LOHA'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trains biases"),
        ({"bias": "every"}, "bias is 'every'"),
        ({"r": 0}, "r is 0"),
        ({"r": 8}, "are not of rank 8"),
        ({"rank_pattern": ["fc2"]}, "rank_pattern is .*expected an object"),
    ],
)
def test_settings_that_cannot_be_carried_are_refused(source, tmp_path, settings, text):
    refused(tmp_path, source, matrices(FC2, (4, 32), (8, 4)), text, **settings)


def test_half_a_pair_and_strange_tensors_are_refused(source, tmp_path):
    half = {f"{FC2}.lora_A.weight": torch.ones(4, 32)}
    refused(tmp_path, source, half, "lacks one of lora_A and lora_B")
    dora = {**matrices(FC2, (4, 32), (8, 4)), f"{FC2}.lora_magnitude_vector": torch.ones(8)}
    refused(tmp_path, source, dora, "no plain LoRA pair")
    refused(tmp_path, source, {HEAD: torch.ones(7, 32)}, r"is \[7, 32\], the base's is \[1381, 32\]")


def test_folder_without_settings_is_no_adapter(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        port_adapter(tmp_path / "empty", tmp_path / "out", source.folder)
