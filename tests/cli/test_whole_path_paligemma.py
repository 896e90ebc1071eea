"""PaliGemma's whole path: an .npz to a proven, tuned, merged, measured model, ready for release, and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click import Command
from click.testing import CliRunner

from weightport import cli

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The golden case, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(TESTS / "golden"), str(TESTS / "finetuning"), *sys.path])
    from golden_case import Case

    return Case(TESTS / "golden" / "cases" / "paligemma2" / "tiny-gemma2", "tiny-gemma2")


def ran(command: Command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_npz_becomes_a_proven_tuned_merged_model_ready_for_release_and_an_npz_again(case: Any) -> None:
    import paligemma2_cases
    from drawn_data import draw_receipts

    Path("original").mkdir()
    original = case.materialize(Path("original"))
    reference = paligemma2_cases.write_case(case, Path("reference.safetensors"))
    data = draw_receipts(Path("receipts"), {"train": 4, "valid": 2, "test": 2})
    ran(cli.port_paligemma2, original, "out")
    ran(cli.port_parity, "out", "--reference", reference, "--json", "out/parity.json", "-q")
    assert json.loads(Path("out/parity.json").read_text())["passed"]

    settings = {
        "training.learning_rate": 1e-2, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
        "training.num_train_epochs": 120, "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1, "training.eval_strategy": "no", "training.save_strategy": "no",
        "training.dataloader_num_workers": 0,
    }  # fmt: skip
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    recipe = ("--recipe", "json-extract")
    train = f"{data}:train"
    ran(cli.port_finetune, "out", "--data", train, "--eval-data", train, "--output", "run", *recipe, *chosen,
        "--cache-features")  # fmt: skip
    tuned = json.loads(Path("run/metrics.json").read_text())
    assert tuned["json-f1"] == tuned["json-valid"] == 1.0, "four receipts were not learned"

    ran(cli.port_merge_lora, "out", "run/adapter", "merged", "--verify")
    assert json.loads(Path("merged/merge.json").read_text())["verification"]["seams"], "peft did not confirm the merge"
    asked = ran(cli.main, "evaluate", "merged", "--data", train, *recipe, "--json",
                "--set", "training.dataloader_num_workers=0")  # fmt: skip
    measured = json.loads(asked.strip().splitlines()[-1])["metrics"]
    assert measured == {name: pytest.approx(value) for name, value in tuned.items() if name != "eval_loss"}

    first = json.loads((data / "train" / "annotations.jsonl").read_text().splitlines()[0])
    said = ran(cli.main, "generate", "merged", data / "train" / first["image"], "--prompt", first["prefix"])
    assert json.loads(said.strip().splitlines()[-1]) == json.loads(first["suffix"])

    captioned = CliRunner().invoke(cli.main, ["generate", "out", str(data / "train" / first["image"]), "--json"])
    assert captioned.exit_code == 0 and "PaliGemmaProcessor" not in captioned.stderr
    answer = json.loads(captioned.stdout.strip().splitlines()[-1])
    assert answer["prompt"] == "caption en" and not answer["text"].startswith("caption en")
    unknown = CliRunner().invoke(
        cli.main, ["generate", "out", str(data / "train" / first["image"]), "--task", "dance"]
    )
    assert unknown.exit_code == 2 and "it has caption, ocr" in unknown.stderr

    card = ran(cli.port_release, "merged", "--repo", "somebody/receipts", "--dry-run")
    for text in (
        "model.safetensors",
        'license: "gemma"',
        "Gemma Terms of Use",
        "## What was merged",
        "json-f1",
        "without the prompt",
    ):
        assert text in card, f"the card says nothing of {text}"

    ran(cli.main, "export", "out", "back.npz")
    before, after = np.load(original), np.load("back.npz")
    assert set(before.files) == set(after.files)
    assert all(np.array_equal(before[name], after[name]) for name in before.files)
    ran(cli.main, "export", "merged", "tuned.npz")
    changed = np.load("tuned.npz")
    different = {name for name in before.files if not np.array_equal(before[name], changed[name])}
    assert {name.removeprefix("params/llm/layers/") for name in different} == {
        "attn/q_einsum/w", "attn/kv_einsum/w", "attn/attn_vec_einsum/w", "mlp/gating_einsum", "mlp/linear",
    }  # fmt: skip
