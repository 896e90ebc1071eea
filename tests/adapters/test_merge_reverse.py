"""extract-lora: a fine-tuned model as an adapter of its base, and what of the change it keeps."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file
from tiny_models import applied, load, logits, write_base

from weightport.adapters import extraction
from weightport.api import extract_lora, merge_lora
from weightport.errors import CoverageError, UsageError


def tune(base: Path, folder: Path, rank: int | None = None) -> Path:
    """A fine-tuned copy: everything changes; matrices by a change of the given rank (None: of full rank)."""
    model = load(base)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn_like(parameter) * 0.02
            if rank is not None and parameter.ndim == 2:
                change = torch.randn(len(parameter), rank) @ torch.randn(rank, parameter.shape[1]) * 0.02
            parameter.add_(change)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["opt", "llama", "gemma", "gpt2", "t5", "resnet"])
def test_whole_change_comes_back_at_full_rank_in_peft_and_merged(name: str, tmp_path: Path) -> None:
    base = write_base(name, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    result = extract_lora(tuned, base, tmp_path / "adapter", 96)
    assert result.share == pytest.approx(1, abs=1e-5)
    merged = merge_lora(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged").directory
    expected = load_file(tuned / "model.safetensors")
    for tensor_name, tensor in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        logits(applied(base, tmp_path / "adapter")), logits(load(tuned).double()), rtol=1e-4, atol=1e-4
    )


def test_rank_keeps_the_largest_singular_values_and_says_their_share(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    result = extract_lora(tuned, base, tmp_path / "adapter", 3)
    name = "model.layers.1.mlp.up_proj.weight"
    change = (
        load_file(tuned / "model.safetensors")[name].double() - load_file(base / "model.safetensors")[name].double()
    )
    values = torch.linalg.svdvals(change).square()
    assert result.kept[name] == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-4)
    assert json.loads((tmp_path / "adapter" / "extraction.json").read_text())["kept"][name] == result.kept[name]


def test_change_of_low_rank_is_kept_whole_by_that_rank(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    result = extract_lora(tune(base, tmp_path / "tuned", rank=2), base, tmp_path / "adapter", 2)
    assert result.share == pytest.approx(1, abs=1e-4)


def test_what_is_no_fine_tuning_is_refused(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    with pytest.raises(UsageError, match="same weights"):
        extract_lora(base, base, tmp_path / "adapter", 2)
    with pytest.raises(CoverageError, match="no fine-tuning"):
        extract_lora(write_base("gemma", tmp_path / "other"), base, tmp_path / "adapter", 2)
    assert not (tmp_path / "adapter").exists()


def test_pairs_are_written_as_they_come_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    factors, alive, most = extraction._factors, [], []

    def watched(pair: extraction._Changed) -> tuple:
        most.append(sum(reference() is not None for reference in alive))
        found = factors(pair)
        alive.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(extraction, "_factors", watched)
    extract_lora(tuned, base, tmp_path / "adapter", 3)
    assert len(most) > 10 and max(most) <= 1


def test_file_is_what_the_safetensors_library_reads_and_progress_ends_at_its_total(tmp_path: Path) -> None:
    base = write_base("gpt2", tmp_path / "base", torch.bfloat16)
    counted: list[int] = []
    totals: list[int] = []
    result = extract_lora(
        tune(base, tmp_path / "tuned"), base, tmp_path / "out", 4, announce=totals.append, advance=counted.append
    )
    assert sum(counted) == totals[0]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = next(iter(result.kept)).removesuffix(".weight")
    assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == 4
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    norm = "transformer.ln_f.weight"
    assert torch.equal(tensors[f"base_model.model.{norm}"], tuned[norm])
