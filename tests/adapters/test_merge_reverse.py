"""extract-lora: a fine-tuned model as an adapter of its base, and what of the change it keeps."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_models import applied, load, logits, write_base

from weightport.adapters import decomposition, extraction
from weightport.adapters.decomposition import Factors, Rank, factors, rank_that_keeps
from weightport.api import extract_lora, merge_lora
from weightport.cli import main
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
    result = extract_lora(tuned, base, tmp_path / "adapter", 96, others="save")
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
    result = extract_lora(tuned, base, tmp_path / "adapter", 3, others="save")
    name = "model.layers.1.mlp.up_proj.weight"
    change = (
        load_file(tuned / "model.safetensors")[name].double() - load_file(base / "model.safetensors")[name].double()
    )
    values = torch.linalg.svdvals(change).square()
    assert result.kept[name] == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-4)
    assert json.loads((tmp_path / "adapter" / "extraction.json").read_text())["kept"][name] == result.kept[name]


def test_change_of_low_rank_is_kept_whole_by_that_rank(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    result = extract_lora(tune(base, tmp_path / "tuned", rank=2), base, tmp_path / "adapter", 2, others="save")
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
    factors, alive, most = extraction.factors, [], []

    def watched(matrix: torch.Tensor, rank: Rank) -> Factors:
        most.append(sum(reference() is not None for reference in alive))
        found = factors(matrix, rank)
        alive.append(weakref.ref(found.a))
        return found

    monkeypatch.setattr(extraction, "factors", watched)
    extract_lora(tuned, base, tmp_path / "adapter", 3, others="save")
    assert len(most) > 10 and max(most) <= 1


def test_file_is_what_the_safetensors_library_reads_and_progress_ends_at_its_total(tmp_path: Path) -> None:
    base = write_base("gpt2", tmp_path / "base", torch.bfloat16)
    counted: list[int] = []
    totals: list[int] = []
    result = extract_lora(
        tune(base, tmp_path / "tuned"),
        base,
        tmp_path / "out",
        4,
        others="save",
        announce=totals.append,
        advance=counted.append,
    )
    assert sum(counted) == totals[0]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = next(iter(result.kept)).removesuffix(".weight")
    assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == 4
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    norm = "transformer.ln_f.weight"
    assert torch.equal(tensors[f"base_model.model.{norm}"], tuned[norm])


def test_what_pairs_do_not_hold_is_refused_by_name_left_out_or_saved(tmp_path: Path) -> None:
    base = write_base("opt", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rank=2)
    with pytest.raises(CoverageError, match=r"(?s)embed_tokens.weight.*fc1.bias.*and 14 more\n.*--others save"):
        extract_lora(tuned, base, tmp_path / "adapter", 2)
    assert not (tmp_path / "adapter").exists()
    result = extract_lora(tuned, base, tmp_path / "adapter", 2, others="leave")
    assert result.whole == () and "model.decoder.layers.0.fc1.bias" in result.left
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] is None
    merged = merge_lora(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged").directory
    before, after, found = (load_file(f / "model.safetensors") for f in (base, tuned, merged))
    for name, value in found.items():
        expected = before[name] if name in result.left else after[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("largest", [decomposition.FULL_SVD, 100])
def test_rank_that_keeps_a_share_is_the_least(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "FULL_SVD", largest)
    torch.manual_seed(4)
    values = torch.linspace(1, 0.05, 150) ** 4
    left, right = (torch.linalg.qr(torch.randn(size, 150))[0] for size in (400, 300))
    matrix = left * values @ right.T
    shares = values.double().square().cumsum(0) / values.double().square().sum()
    for wanted in (0.3, 0.9, 0.99, 0.9999, 1.0):
        rank = rank_that_keeps(matrix, wanted)
        found = factors(matrix, rank)
        assert wanted == 1 or rank.kept == int((shares < wanted).sum()) + 1
        assert 1 - found.lost / found.total >= wanted - 1e-6
        assert found.a.shape == (rank.kept, 300) and found.b.shape == (400, rank.kept)


def test_rank_found_by_itself_keeps_the_share_in_every_weight(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    result = extract_lora(tuned, base, tmp_path / "adapter", None, keep=0.9, others="save")
    assert min(result.kept.values()) >= 0.9 and result.share < 0.95
    assert len(set(result.ranks.values())) > 1 and max(result.ranks.values()) < 32
    assert json.loads((tmp_path / "adapter" / "extraction.json").read_text())["ranks"] == dict(result.ranks)
    merged = merge_lora(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged").directory
    applied_in_peft = applied(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(load(merged).double()), logits(applied_in_peft), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--rank", "4", "--keep", "0.9"), 2, "pass --rank auto"),
        (("--rank", "auto", "--keep", "1.5"), 2, "more than 0 and at most 1"),
        (("--rank", "auto", "--keep", "nan"), 2, "more than 0 and at most 1"),
        (("--rank", "some"), 2, "neither auto nor a rank"),
        (("--rank", "0"), 2, "neither auto nor a rank"),
        (("--rank", "auto"), 1, "--others save"),
        (("--rank", "auto", "--others", "leave"), 0, "left out"),
    ],
)
def test_extraction_from_the_command_line(words: tuple[str, ...], status: int, said: str, tmp_path: Path) -> None:
    base = write_base("opt", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rank=2)
    done = CliRunner().invoke(main, ["extract-lora", str(tuned), str(base), str(tmp_path / "out"), *words])
    assert done.exit_code == status and said in done.output, done.output
    assert (tmp_path / "out").exists() == (status == 0)
