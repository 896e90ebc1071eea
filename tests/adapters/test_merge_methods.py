"""Methods other than LoRA that add a matrix to a weight: merged as that matrix, as peft computes it in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import peft
from matrix import distance, merged_by_peft, write_model
from safetensors.torch import load_file, save_file
from test_merge_proof import merged
from tiny_models import load, write_adapter, write_base

from weightport.adapters.base.base_model import open_base
from weightport.adapters.merging.additive_check import ExpectedDelta
from weightport.adapters.merging.additive_delta import additive_change, additive_part
from weightport.adapters.merging.combination import Combination
from weightport.adapters.merging.lora_targets import DeltaChange, Part
from weightport.adapters.merging.merge import MergeOptions
from weightport.adapters.merging.module_names import Place
from weightport.adapters.merging.planned_edits import _not_of_the_base
from weightport.adapters.merging.weight_delta import ByRows
from weightport.adapters.reading.lora_tensors import open_adapter
from weightport.adapters.verification.verify import why_not_verified
from weightport.api import merge_lora
from weightport.converters.stored_pieces import Piece
from weightport.errors import AdapterError, NonFiniteError, UsageError

METHODS: Mapping[str, Callable[[list[str]], Any]] = {
    "loha": lambda t: peft.LoHaConfig(r=4, alpha=3, target_modules=t),
    "loha-patterns": lambda t: peft.LoHaConfig(
        r=4, alpha=3, target_modules=t, rank_pattern={t[0]: 2}, alpha_pattern={rf".*\.1\..*{t[1]}": 5}
    ),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=3, target_modules=t),
    "lokr-both": lambda t: peft.LoKrConfig(r=1, alpha=3, target_modules=t, decompose_both=True),
    "lokr-full": lambda t: peft.LoKrConfig(r=64, alpha=3, target_modules=t, decompose_factor=4),
    "vera": lambda t: peft.VeraConfig(r=4, target_modules=t),
    "miss": lambda t: peft.MissConfig(r=5, target_modules=t),
    "miss-mini": lambda t: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=t),
    "c3a": lambda t: peft.C3AConfig(block_size=8, target_modules=t),
    "gralora": lambda t: peft.GraloraConfig(r=4, alpha=3, gralora_k=2, target_modules=t),
    "gralora-hybrid": lambda t: peft.GraloraConfig(r=4, alpha=3, gralora_k=2, hybrid_r=2, target_modules=t),
    "delora": lambda t: peft.DeloraConfig(r=4, target_modules=t),
    "vblora": lambda t: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, target_modules=t),
    "vblora-topk": lambda t: peft.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=8, topk=3, target_modules=t, save_only_topk_weights=True
    ),
    "randlora": lambda t: peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=t),
    "miss-bat": lambda t: peft.MissConfig(r=8, init_weights="bat", target_modules=t),
    "fourierft": lambda t: peft.FourierFTConfig(
        n_frequency=50, scaling=150, n_frequency_pattern={t[0]: 7}, target_modules=t
    ),
    "fourierft-many": lambda t: peft.FourierFTConfig(n_frequency=700, target_modules=t),
    "waveft": lambda t: peft.WaveFTConfig(n_frequency=50, random_loc_seed=5, target_modules=t),
    "waveft-db3": lambda t: peft.WaveFTConfig(
        n_frequency=300, wavelet_family="db3", proportional_parameters=True, target_modules=t
    ),
    "waveft-elements": lambda t: peft.WaveFTConfig(n_frequency=50, use_idwt=False, target_modules=t),
    "unilora": lambda t: peft.UniLoraConfig(r=4, theta_d_length=64, save_indices=True, target_modules=t),
    "tinylora": lambda t: peft.TinyLoraConfig(r=3, u=5, target_modules=t),
    "tinylora-shared": lambda t: peft.TinyLoraConfig(r=2, u=5, weight_tying=0.5, target_modules=t),
    "tinylora-one": lambda t: peft.TinyLoraConfig(r=2, u=5, weight_tying=1, projection_seed=7, target_modules=t),
}
TARGETS = {"llama": ["q_proj", "down_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"], "resnet": ["convolution"]}
FLIPPED = ("vera", "vblora", "randlora", "gralora-hybrid", "fourierft", "waveft", "waveft-db3", "unilora", "tinylora")
CONVOLUTIONS = {
    "loha": lambda t: peft.LoHaConfig(r=4, alpha=3, target_modules=t),
    "loha-core": lambda t: peft.LoHaConfig(r=4, alpha=3, target_modules=t, use_effective_conv2d=True),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=3, target_modules=t),
    "lokr-core": lambda t: peft.LoKrConfig(r=1, alpha=3, target_modules=t, use_effective_conv2d=True),
}


def agree(base: Path, config: Any, folder: Path) -> None:
    adapter = write_adapter(base, folder / "adapter", config)
    dtype = load(base).dtype
    weights, model = merged(base, adapter, folder / "out")
    assert weights.compared == weights.changed == model.changed == model.weights > 1
    assert model.seams
    assert weights.furthest <= 1 and model.weight_steps <= 1 and not model.unchecked
    assert distance(load(folder / "out").state_dict(), merged_by_peft(base, adapter), dtype) < 0.55


@pytest.mark.parametrize("method", METHODS)
def test_merge_of_a_method_is_pefts(method: str, tmp_path: Path) -> None:
    # peft transforms in float32 whatever the model's dtype, which is four roundings of a float32 weight.
    dtype = torch.float16 if method.startswith("fourierft") else torch.float32
    agree(write_model("llama", tmp_path / "base", dtype), METHODS[method](TARGETS["llama"]), tmp_path)


@pytest.mark.parametrize("method", FLIPPED)
def test_weights_kept_as_in_out_are_merged(method: str, tmp_path: Path) -> None:
    config = METHODS[method](TARGETS["gpt2"])
    config.fan_in_fan_out = True
    agree(write_model("gpt2", tmp_path / "base", torch.bfloat16), config, tmp_path)


@pytest.mark.parametrize("method", CONVOLUTIONS)
def test_convolutions_are_merged(method: str, tmp_path: Path) -> None:
    agree(write_model("resnet", tmp_path / "base"), CONVOLUTIONS[method](TARGETS["resnet"]), tmp_path)


def test_sum_of_a_method_and_lora_with_weights(tmp_path: Path) -> None:
    base = write_model("llama", tmp_path / "base", torch.float32)
    other = write_adapter(base, tmp_path / "a", METHODS["loha"](TARGETS["llama"]))
    lora = write_adapter(base, tmp_path / "b", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    reasons: list[str | None] = []
    out = merge_lora(
        base, [(other, 0.5), (lora, -2.0)], tmp_path / "out", check=lambda w: reasons.append(why_not_verified(w))
    )
    assert reasons == ["peft has neither weights nor sums for LOHA adapters"]
    assert out.record["weights_check"]["compared"] == out.record["weights_check"]["changed"] == 6
    before, a, b = load(base, torch.float64).state_dict(), merged_by_peft(base, other), merged_by_peft(base, lora)
    expected = {name: v + 0.5 * (a[name] - v) - 2 * (b[name] - v) for name, v in before.items()}
    assert distance(load(out.directory).state_dict(), expected, torch.float32) < 0.55
    with pytest.raises(UsageError, match="LOHA adapter, which has no pairs"):
        merge_lora(base, [(other, 0.5), (lora, 1)], tmp_path / "no", MergeOptions(combination=Combination("linear")))


def edited(adapter: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if name.endswith(part))


WRONG: Mapping[str, tuple[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], None], type[Exception], str]] = {
    "another width": ("loha", lambda t, c: t.update({first(t, "w1_b"): torch.ones(4, 31)}), AdapterError, "not fit"),
    "another height": ("lokr", lambda t, c: t.update({first(t, "_w1"): torch.ones(5, 4)}), AdapterError, "not fit"),
    "a part is absent": ("delora", lambda t, c: t.pop(first(t, "delora_B")), AdapterError, "it has no delora_B"),
    "NaN": ("vera", lambda t, c: t[first(t, "lambda_b")].fill_(float("nan")), NonFiniteError, "NaN"),
    "projection not saved": ("vera", lambda t, c: t.pop("base_model.vera_A"), AdapterError, "has no vera_A"),
    "alpha is no number": ("loha", lambda t, c: c.update(alpha="x"), AdapterError, "alpha is 'x'"),
    "alpha beyond all numbers": ("loha", lambda t, c: c.update(alpha=10**400), AdapterError, "alpha is 1000"),
    "no topk": ("vblora", lambda t, c: c.update(topk=-1), AdapterError, "topk is -1; expected a number of at least 1"),
    "half a topk": ("vblora", lambda t, c: c.update(topk=0.5), AdapterError, "topk is 0.5"),
    "more topk than vectors": ("vblora", lambda t, c: c.update(topk=99), AdapterError, "not fit"),
    "not bat's blocks": ("miss", lambda t, c: c.update(init_weights="bat"), AdapterError, "not fit"),
    "bat over another height": (
        "miss-bat", lambda t, c: t.update({first(t, "miss_block"): torch.ones(3, 8, 8)}), AdapterError, "another base"
    ),
    "a seed that is no number": ("fourierft", lambda t, c: c.update(random_loc_seed="x"), AdapterError, "seed is 'x'"),
    "more coefficients than places": (
        "waveft", lambda t, c: t.update({first(t, "spectrum"): torch.ones(9999)}), AdapterError, "not fit"
    ),
    "a wavelet without filters": (
        "waveft", lambda t, c: c.update(wavelet_family="db11"), AdapterError, "has no filters of"
    ),
    "a wavelet wider than peft leaves room for": (
        "waveft", lambda t, c: c.update(wavelet_family="coif5"), AdapterError, "filters of 48 values"
    ),
    "no wavelet": ("waveft", lambda t, c: c.update(wavelet_family="x"), AdapterError, "which peft does not have"),
    "places not saved": ("unilora", lambda t, c: c.update(save_indices=False), AdapterError, "save_indices is false"),
    "another seed": ("tinylora", lambda t, c: c.update(projection_seed=3), AdapterError, "not those of the seed 3"),
    "projections not saved": (
        "tinylora", lambda t, c: [t.pop(k) for k in list(t) if "_P" in k], AdapterError, "has no tinylora_P"
    ),
    "a vector is absent": ("tinylora", lambda t, c: t.pop(first(t, "v.4")), AdapterError, "no tinylora_v.4"),
    "a share of vectors that is none": (
        "tinylora", lambda t, c: c.update(weight_tying=2), AdapterError, "weight_tying 2; expected"
    ),
    "places beyond the vector": (
        "unilora", lambda t, c: t[first(t, "indices_B")].fill_(64), AdapterError, "from 64 to 64"
    ),
    "another method's tensors": ("miss", lambda t, c: c.update(peft_type="LOHA"), AdapterError, "LOHA adapter, and"),
    "another vector bank": (
        "vblora-topk",
        lambda t, c: t.update({"base_model.vblora_vector_bank": torch.ones(16, 7)}),
        AdapterError,
        "not fit",
    ),
    "modules that the base has not": (
        "c3a",
        lambda t, c: [t.update({k.replace("q_proj", "z_proj"): t.pop(k)}) for k in list(t) if "q_proj" in k],
        AdapterError,
        "belongs to another base",
    ),
    "a module is absent": (
        "c3a", lambda t, c: t.pop(first(t, "layers.1.mlp.up_proj.c3a_kernel")), AdapterError, "is incomplete"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_adapter_of_a_method_that_cannot_be_merged_is_refused(case: str, tmp_path: Path) -> None:
    method, change, error, said = WRONG[case]
    base = write_model("llama", tmp_path / "base")
    adapter = edited(write_adapter(base, tmp_path / "adapter", METHODS[method](TARGETS["llama"])), change)
    with pytest.raises(error, match=said):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_change_that_multiplies_the_weight_needs_it_as_the_files_have_it(tmp_path: Path) -> None:
    base = write_model("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", METHODS["miss-bat"](["up_proj"]))
    with pytest.raises(AdapterError, match=r"up_proj: MiSS's bat multiplies the base's weight, which is rounded"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(quantized_base="nf4"))
    assert not (tmp_path / "out").exists()
    delta, ref = open_adapter(adapter).deltas[0], next(iter(open_base(base).checkpoint.tensors.values()))
    piece = Piece("fused", ((50, 98), (0, 32)), (0, 1), (0, 0))
    stored_within = DeltaChange(0, delta, Part(Place("up_proj", (48, 32), (piece,)), piece))
    assert "hold in other parts" in str(_not_of_the_base(stored_within, ref, quantized=False))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("PROMPT_TUNING", "PROMPT_TUNING, which puts trained vectors before the prompt"),
        ("PREFIX_TUNING", "trained vectors before the prompt"),
        ("XLORA", "chooses among adapters"),
        ("PSOFT", "singular vectors of the base that are saved nowhere"),
        ("OFT", "a rotation of the base's weights"),
        ("SOMETHING", "'SOMETHING'; merged are LORA, LOHA"),
    ],
)
def test_other_methods_are_refused_by_name(kind: str, said: str, tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    edited(adapter, lambda tensors, config: config.update(peft_type=kind))
    with pytest.raises(AdapterError, match=said):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")


@pytest.mark.parametrize("method", ["loha", "vera"])
def test_matrix_under_the_names_on_disk(method: str, tmp_path: Path) -> None:
    agree(write_model("llava", tmp_path / "base", hub=True), METHODS[method](["q_proj", "fc1"]), tmp_path)


@pytest.mark.parametrize("method", ["loha", "vera"])
@pytest.mark.parametrize("turned", [False, True])
def test_matrix_of_a_weight_that_is_stored_within_another(method: str, turned: bool, tmp_path: Path) -> None:
    base = write_model("llama", tmp_path / "base")
    adapter = open_adapter(write_adapter(base, tmp_path / "adapter", METHODS[method](["up_proj"])))
    shape, stored = (48, 32), (32, 100) if turned else (100, 32)
    source = ((0, 32), (50, 98)) if turned else ((50, 98), (0, 32))
    piece = Piece("fused", source, (1, 0) if turned else (0, 1), (0, 0))
    delta = adapter.deltas[0]
    weight = next(iter(open_base(base).checkpoint.tensors.values()))
    whole = additive_change(delta, shape, adapter.settings, torch.float64, 2.0, weight.read, turned=False)
    found = torch.empty(stored, dtype=torch.float64)
    additive_part(whole, piece, stored).rows(0, stored[0], found)
    change = DeltaChange(0, delta, Part(Place("up_proj", shape, (piece,)), piece))
    expected = ExpectedDelta(change, adapter.settings.data, 2.0, stored, weight)
    torch.testing.assert_close(found, expected.matrix(stored[1]))
    assert found.any() and not found.T[:50].any() if turned else not found[:50].any()


def test_grid_of_many_blocks_takes_no_more_than_the_weight(tmp_path: Path) -> None:
    """A pair of the whole grid would have rank · blocks columns."""
    base = write_model("llama", tmp_path / "base")
    config = peft.GraloraConfig(r=32, alpha=3, gralora_k=16, hybrid_r=3, target_modules=["up_proj"])
    adapter = write_adapter(base, tmp_path / "adapter", config)
    opened = open_adapter(adapter)
    values = torch.zeros(48, 32)
    change = additive_change(
        opened.deltas[0], (48, 32), opened.settings, torch.float64, 1.0, lambda: values, turned=False
    )
    assert isinstance(change, ByRows)
    agree(base, config, tmp_path / "again")
