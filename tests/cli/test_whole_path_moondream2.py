"""moondream2's whole path: a folder of the Hub to a proven, tuned, merged model, released with its code; and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click import Command
from click.testing import CliRunner

from weightport import cli
from weightport.checkpoints import open_checkpoint

TESTS = Path(__file__).resolve().parents[1]
ELSEWHERE = """
import sys
sys.modules["weightport"] = None  # any import of it fails
import json
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
inputs = processor(images=Image.open(picture), text=processor.prompt("query", question), return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
print(json.dumps(processor.answers(model.generate(**inputs), inputs)[0]))
"""


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The golden case, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(TESTS / "golden"), str(TESTS / "finetuning"), *sys.path])
    from golden_case import Case

    return Case(TESTS / "golden" / "cases" / "moondream2" / "tiny-2024-04-02", "tiny-2024-04-02")


def ran(command: Command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_folder_becomes_a_proven_tuned_merged_model_that_needs_no_weightport(case: Any) -> None:
    import moondream2_cases
    from test_moondream2 import coins

    Path("original").mkdir()
    case.materialize(Path("original"))
    reference = moondream2_cases.write_case(case, Path("reference.safetensors"))
    data = coins(Path("coins"))
    seen = ran(cli.main, "inspect", "original")
    assert "moondream2" in seen and "the projector takes the features of one view" in " ".join(seen.split())
    ran(cli.port_moondream2, "original", "out", "--revision", "2024-04-02", "--dtype", "float32", "--portable")
    ran(cli.port_parity, "out", "--reference", reference, "--json", "out/parity.json", "-q")
    assert json.loads(Path("out/parity.json").read_text())["passed"]

    settings = {
        "training.learning_rate": 1e-2, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
        "training.max_steps": 200, "training.per_device_train_batch_size": 4, "training.logging_steps": 50,
        "training.eval_strategy": "no", "training.save_strategy": "no", "training.dataloader_num_workers": 0,
    }  # fmt: skip
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    recipe = ("--recipe", "count-json")
    ran(cli.port_finetune, "out", "--data", data, "--eval-data", data, "--output", "run", *recipe, *chosen,
        "--method", "lora", "--cache-features")  # fmt: skip
    tuned = json.loads(Path("run/metrics.json").read_text())
    assert tuned["exact-match-json"] == 1.0, "four pictures were not learned"

    ran(cli.port_merge_lora, "out", "run/adapter", "merged", "--verify")
    asked = ran(cli.main, "evaluate", "merged", "--data", data, *recipe, "--json",
                "--set", "training.dataloader_num_workers=0")  # fmt: skip
    measured = json.loads(asked.strip().splitlines()[-1])["metrics"]
    assert measured == {name: pytest.approx(value) for name, value in tuned.items() if name != "eval_loss"}

    card = ran(cli.port_release, "merged", "--repo", "somebody/coins", "--dry-run")
    for text in ("model.safetensors", "modeling_moondream.py", 'license: "apache-2.0"', "exact-match-json"):
        assert text in card, f"the card says nothing of {text}"

    document = json.loads(data.read_text())
    picture = next(Path("coins").rglob(document["images"][0]["file_name"]))
    from weightport.finetuning.data import open_data
    from weightport.finetuning.data.settings import DataSettings

    sample = open_data(str(data), DataSettings(form="counting"))[0]
    said = ran(cli.main, "generate", "merged", picture, "--prompt", sample.prefix, "--json")
    answer = json.loads(said.strip().splitlines()[-1])
    assert json.loads(answer["text"]) == json.loads(sample.suffix)

    environment = {**os.environ, "HF_MODULES_CACHE": str(Path("modules").resolve()), "PYTHONPATH": ""}
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, "merged", str(picture), sample.prefix],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert json.loads(json.loads(finished.stdout.strip().splitlines()[-1])) == json.loads(sample.suffix)

    ran(cli.port_moondream2, "original", "kept", "--revision", "2024-04-02")
    ran(cli.main, "export", "kept", "back")
    before, after = open_checkpoint(Path("original")), open_checkpoint(Path("back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name].read(), after[name].read()) for name in before)
