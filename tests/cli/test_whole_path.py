"""The README's whole path, from a fairseq checkpoint to a release, on the demo's files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click import Command
from click.testing import CliRunner

from weightport import cli

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples" / "tiny-caption.yaml"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """examples/demo.py, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    found = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found.loader.exec_module(module)
    return module


def ran(command: Command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_checkpoint_becomes_a_proven_tuned_merged_model_ready_for_release(demo: ModuleType) -> None:
    checkpoint, data = demo.prepare(), Path("demo/captions/train.jsonl")
    demo.draw_captions(data.parent)
    ran(cli.port_ofa, checkpoint, "out")
    ran(cli.port_parity, "out", "--reference", "demo/reference.safetensors", "--json", "out/parity.json", "-q")

    recipe = ("--recipe", RECIPE)
    ran(cli.port_finetune, "out", "--data", data, "--eval-data", data, "--output", "run", *recipe)
    tuned = json.loads(Path("run/metrics.json").read_text())
    assert tuned["exact-match"] == tuned["rouge-l"] == 1.0, "the captions of four pictures were not learned"

    ran(cli.port_merge_lora, "out", "run/adapter", "merged")
    assert json.loads(Path("merged/merge.json").read_text())["verification"], "peft did not confirm the merge"
    asked = ran(cli.main, "evaluate", "merged", "--data", data, *recipe, "--json")
    measured = json.loads(asked.strip().splitlines()[-1])["metrics"]
    assert measured == {name: pytest.approx(value) for name, value in tuned.items() if name != "eval_loss"}

    # The base is the one that was proven; the merged model is another.
    failed = CliRunner().invoke(cli.port_parity, ["merged", "--reference", "demo/reference.safetensors"])
    assert failed.exit_code == 1 and "departs from the original, first at encoder.layers.0" in failed.output, (
        failed.output
    )
    card = ran(cli.port_release, "merged", "--repo", "somebody/captions", "--dry-run")
    for text in (
        "model.safetensors",
        "modeling_ofa.py",
        "## What was merged",
        "## How it was fine-tuned",
        "exact-match",
    ):
        assert text in card, f"the card says nothing of {text}"
    assert not Path("merged/README.md").exists()
