"""Several adapters in one merge: the exact weighted sum, and peft's combinations under their own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import load, write_adapter, write_base

from weightport.adapters.merging.combination import COMBINATIONS, Combination
from weightport.adapters.merging.merge import MergeOptions, Written
from weightport.adapters.verification.verify import UnverifiableError, Verification, verify_merge, why_not_verified
from weightport.api import merge_lora
from weightport.errors import AdapterError, UsageError

WEIGHTS = (0.7, -0.4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama", tmp_path_factory.mktemp("combined") / "base")


def two_adapters(base: Path, folder: Path, **second: Any) -> tuple[Path, Path]:
    first = write_adapter(
        base, folder / "one", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    )
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"], **second}
    return first, write_adapter(base, folder / "two", LoraConfig(**settings), seed=2)


def truth(base: Path, adapters: tuple[Path, Path], **options: Any) -> dict[str, torch.Tensor]:
    """Weights after peft's add_weighted_adapter and merge, in float64."""
    model = PeftModel.from_pretrained(load(base, torch.float64), adapters[0], "one", autocast_adapter_dtype=False)
    model.load_adapter(adapters[1], "two", autocast_adapter_dtype=False)
    model.double()
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", **options)
    model.set_adapter("both")
    return dict(model.double().merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_combination_is_pefts_of_the_same_name(kind: str, base: Path, tmp_path: Path) -> None:
    adapters = two_adapters(base, tmp_path)
    density = 0.6 if "ties" in kind or "prune" in kind else None
    expected = truth(base, adapters, combination_type=kind, density=density)
    options = MergeOptions(combination=Combination(kind, density))
    merged = merge_lora(base, list(zip(adapters, WEIGHTS)), tmp_path / "out", options).directory
    for name, weight in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(
            weight.double(), expected[name].double(), rtol=1e-6, atol=2e-7, msg=lambda m, n=name: n + m
        )


def test_sum_takes_adapters_of_different_ranks_and_scalings(base: Path, tmp_path: Path) -> None:
    adapters = two_adapters(base, tmp_path, r=2, use_rslora=True)
    merged = merge_lora(base, list(zip(adapters, WEIGHTS)), tmp_path / "out").directory
    expected = load_file(base / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"].double()
    for adapter, scale in zip(adapters, (6 / 4 * WEIGHTS[0], 12 / 2**0.5 * WEIGHTS[1])):
        pair = load_file(adapter / "adapter_model.safetensors")
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
        expected += scale * pair[name.format("B")].double() @ pair[name.format("A")].double()
    weight = load_file(merged / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(weight, expected.float())


def test_half_the_weight_is_half_the_change(base: Path, tmp_path: Path) -> None:
    adapter = two_adapters(base, tmp_path)[1]
    name = "model.layers.0.self_attn.o_proj.weight"
    before = load_file(base / "model.safetensors")[name].double()
    half, full = (
        load_file(merge_lora(base, [(adapter, w)], tmp_path / str(w)).directory / "model.safetensors")[name].double()
        for w in (0.5, 1.0)
    )
    torch.testing.assert_close(half - before, (full - before) / 2, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_combinations_are_refused_by_name(kind: str, base: Path, tmp_path: Path) -> None:
    adapters = two_adapters(base, tmp_path)
    with pytest.raises(UsageError, match=kind):
        merge_lora(
            base, [(a, 1.0) for a in adapters], tmp_path / "out", MergeOptions(combination=Combination(kind, 0.5))
        )


@pytest.mark.parametrize(
    ("combination", "second", "what"),
    [
        (Combination("ties"), {}, "density"),
        (Combination("linear", 0.5), {}, "density"),
        (Combination("ties", 1.5), {}, "density"),
        (Combination("linear"), {"r": 2}, "ranks 4, 2"),
        (Combination("svd"), {"use_rslora": True}, "rslora"),
        (Combination("cat"), {"use_dora": True}, "DoRA"),
        (Combination("cat"), {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, None),
    ],
)
def test_combination_that_has_no_meaning_is_refused(
    combination: Combination, second: dict[str, Any], what: str | None, base: Path, tmp_path: Path
) -> None:
    adapters = two_adapters(base, tmp_path, **second)
    options = MergeOptions(combination=combination)
    if what is None:
        merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "out", options)
        return
    with pytest.raises(UsageError, match=what):
        merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_two_whole_tensors_for_one_place_are_refused(base: Path, tmp_path: Path) -> None:
    adapters = [
        write_adapter(
            base,
            tmp_path / name,
            LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            seed=seed,
        )
        for seed, name in enumerate(("one", "two"))
    ]
    with pytest.raises(AdapterError, match="have no sum"):
        merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "out")


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_decomposition_keeps_the_largest_rank_of_any_adapter(kind: str, base: Path, tmp_path: Path) -> None:
    """Also in modules where rank_pattern gives less, or where only the adapter of the smaller rank is."""
    adapters = [
        write_adapter(base, tmp_path / name, LoraConfig(lora_alpha=5, **settings), seed=seed)
        for seed, (name, settings) in enumerate(
            {
                "one": {"r": 2, "rank_pattern": {"q_proj": 5}, "target_modules": ["q_proj", "k_proj", "o_proj"]},
                "two": {"r": 1, "target_modules": ["k_proj", "up_proj"]},
            }.items()
        )
    ]
    density = None if kind == "svd" else 0.6
    expected = truth(base, adapters, combination_type=kind, density=density)
    options = MergeOptions(combination=Combination(kind, density))
    merged = merge_lora(base, list(zip(adapters, WEIGHTS)), tmp_path / "out", options).directory
    for name, weight in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(
            weight.double(), expected[name].double(), rtol=1e-6, atol=2e-7, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_module_in_which_the_adapters_have_different_ranks_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    adapters = [
        write_adapter(base, tmp_path / str(rank), LoraConfig(r=4, target_modules=["q_proj"], rank_pattern=pattern))
        for rank, pattern in ((4, {}), (2, {"0.self_attn.q_proj": 2}))
    ]
    options = MergeOptions(combination=Combination(kind, None if kind == "linear" else 0.5))
    with pytest.raises(AdapterError, match=r"layers.0.*one rank; the adapters have the ranks 2, 4 there"):
        merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "out", options)


@pytest.mark.parametrize("kind", ["linear", "ties", "svd"])
def test_one_adapter_is_merged_by_its_weight_whatever_the_combination(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = two_adapters(base, tmp_path)[0]
    options = MergeOptions(combination=Combination(kind, 0.5 if kind == "ties" else None, svd_rank=1))
    found, expected = (
        load_file(merge_lora(base, [(adapter, 0.5)], tmp_path / str(o is None), o).directory / "model.safetensors")
        for o in (options, None)
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_rank_that_no_weight_has_is_merged_and_not_run_by_peft(base: Path, tmp_path: Path) -> None:
    adapters = two_adapters(base, tmp_path, target_modules=["q_proj"])
    reasons: list[str | None] = []
    exact = merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "cat").directory
    merged = merge_lora(
        base,
        [(a, 1.0) for a in adapters],
        tmp_path / "svd",
        MergeOptions(combination=Combination("svd", svd_rank=999)),
        check=lambda written: reasons.append(why_not_verified(written)),
    ).directory
    assert reasons == ["peft runs no --svd-rank 999 on weights that have the rank 32"]
    expected = load_file(exact / "model.safetensors")
    for name, value in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


BESIDE_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "saved as a whole"),
    "rows": ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}}, "single rows"),
}


@pytest.mark.parametrize("what", BESIDE_PAIRS)
@pytest.mark.parametrize("kind", ["linear", "svd"])
def test_combination_of_pairs_refuses_what_it_would_leave_out(
    kind: str, what: str, base: Path, tmp_path: Path
) -> None:
    settings, said = BESIDE_PAIRS[what]
    adapters = [
        write_adapter(base, tmp_path / "one", LoraConfig(r=4, **settings)),
        write_adapter(base, tmp_path / "two", LoraConfig(r=4, target_modules=["q_proj"])),
    ]
    with pytest.raises(AdapterError, match=f"{kind} combines pairs and leaves out .*{said}"):
        merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "out", MergeOptions(combination=Combination(kind)))


def test_biases_of_pairs_have_a_sum_and_no_combination(tmp_path: Path) -> None:
    base = write_base("opt", tmp_path / "base")
    adapters = [
        write_adapter(
            base, tmp_path / str(seed), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), seed=seed
        )
        for seed in (1, 2)
    ]
    with pytest.raises(AdapterError, match="linear combines pairs and leaves out biases of pairs"):
        merge_lora(
            base, [(a, 1.0) for a in adapters], tmp_path / "no", MergeOptions(combination=Combination("linear"))
        )
    checks: list[Verification] = []
    merge_lora(base, list(zip(adapters, WEIGHTS)), tmp_path / "out", check=lambda w: checks.append(verify_merge(w)))
    assert checks[0].weights == checks[0].changed == 4 and checks[0].seams


def test_adapters_that_peft_does_not_run_together_are_merged_and_not_verified(base: Path, tmp_path: Path) -> None:
    adapters = [
        write_adapter(
            base,
            tmp_path / str(row),
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [row]}),
        )
        for row in (3, 4)
    ]

    def check(written: Written) -> None:
        with pytest.raises(UnverifiableError, match="peft does not run these adapters together"):
            verify_merge(written)

    merged = merge_lora(base, [(a, 1.0) for a in adapters], tmp_path / "out", check=check)
    assert merged.record["weights_check"]["compared"] == 3
