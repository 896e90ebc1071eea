"""BLIP-2's whole path at tiny size: three sources, one of them a training checkpoint with its optimizer's state, to a
release and back to LAVIS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from weightport import cli

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "golden"), str(TESTS / "finetuning")]

import blip2_cases  # noqa: E402 - found beside the cases
from drawn_data import draw_jsonl, write_lines  # noqa: E402
from golden_case import Case  # noqa: E402

CASE = Case(TESTS / "golden/cases/blip2/opt-tiny", "opt-tiny")
CAPTIONS = ("red cat on mat", "big dog in sun", "old hat by bed", "hot tea for two")
SETTINGS = {
    "training.learning_rate": 3e-2,
    "training.num_train_epochs": 300,
    "training.per_device_train_batch_size": 4,
    "training.eval_strategy": "no",
    "training.save_strategy": "no",
    "training.logging_steps": 50,
    "training.dataloader_num_workers": 0,
    "training.bf16": False,
    "model.config.text_config.dropout": 0.0,
    "lora.lora_dropout": 0.0,
}


def ran(command, *arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_three_sources_become_a_proven_tuned_merged_model_that_lavis_reads_again(here: Path) -> None:
    sources = blip2_cases.sources(CASE, CASE.materialize(here / "lavis"))
    assert "optimizer" in torch.load(sources["checkpoint"], weights_only=True)
    beside = ("--llm", sources["llm"], "--vision", sources["vision"], "--vision-heads", 4, "--qformer-heads", 4)
    shown = ran(cli.port_blip2, sources["checkpoint"], "out", *beside, "--dry-run")
    assert "gives 43 tensors (visual_encoder 43)" in shown and "optimizer state" in shown
    assert not Path("out").exists()
    ran(cli.port_blip2, sources["checkpoint"], "out", *beside)
    blip2_cases.write_case(CASE, here / "reference.safetensors")
    ran(cli.port_parity, "out", "--reference", "reference.safetensors", "--json", "out/parity.json", "-q")

    data = draw_jsonl(here / "pairs", len(CAPTIONS))
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    write_lines(data, [{"image": row["image"], "text": text} for row, text in zip(rows, CAPTIONS)])
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    ran(
        cli.port_finetune, "out", "--data", data, "--eval-data", data, "--output", "run",
        "--recipe", "lora-caption", *settings,
    )  # fmt: skip
    tuned = json.loads(Path("run/metrics.json").read_text())
    assert (tuned["cider-d"], tuned["rouge-l"]) == (10.0, 1.0), "the captions of four pictures were not learned"

    ran(cli.port_merge_lora, "out", "run/adapter", "merged")
    assert json.loads(Path("merged/merge.json").read_text())["verification"], "peft did not confirm the merge"
    asked = ran(cli.main, "evaluate", "merged", "--data", data, "--recipe", "lora-caption", *settings, "--json")
    measured = json.loads(asked.strip().splitlines()[-1])["metrics"]
    assert measured == {name: pytest.approx(value) for name, value in tuned.items() if name != "eval_loss"}

    card = ran(cli.port_release, "merged", "--repo", "somebody/captions", "--dry-run", "--licence", "other")
    for text in ("model.safetensors", "## What was merged", "## How it was fine-tuned", "cider-d", "OPT-175B"):
        assert text in card, f"the card says nothing of {text}"

    ran(cli.main, "export", "out", "same.pth")
    back, trained = (torch.load(path, weights_only=True)["model"] for path in ("same.pth", sources["checkpoint"]))
    assert list(back) == [name for name in trained if not name.startswith("opt_model.")]
    assert all(torch.equal(back[name], trained[name]) for name in back)
    # What the merge changed of the language model goes with the trained parts, and nothing else of it.
    ran(cli.main, "export", "merged", "merged.pth")
    merged = torch.load("merged.pth", weights_only=True)["model"]
    assert all(torch.equal(merged[name], back[name]) for name in back)
    assert {name for name in merged if name not in back} == {
        f"opt_model.model.decoder.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qv"
    }
