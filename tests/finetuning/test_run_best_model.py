"""`load_best_model_at_end`: what is published was measured on the model that is saved, and says at which step."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_runs import assigned, run

from weightport import cli
from weightport.finetuning.training.results import Outcome

GROWING = {
    "training.load_best_model_at_end": True,
    "training.metric_for_best_model": "eval_loss",
    "training.greater_is_better": False,
    "training.eval_strategy": "steps",
    "training.eval_steps": 1,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.save_total_limit": None,
    "training.max_steps": 4,
    "training.logging_steps": 1,
    "training.per_device_train_batch_size": 4,
    "training.learning_rate": 0.3,
    "training.warmup_steps": 0,
    "training.lr_scheduler_type": "constant",
    "training.dataloader_num_workers": 0,
    "evaluation.metrics": ["levenshtein"],
}
"""So large a rate that the last model is worse than an earlier one."""


def best_of(outcome: Outcome, best_by: Callable[..., Any] = min) -> tuple[int, dict[str, float]]:
    """Step and figures of the evaluation with the best loss, from the history."""
    rows = [row for row in outcome.history if "eval_loss" in row]
    best = best_by(rows, key=lambda row: row["eval_loss"])
    assert best["step"] != rows[-1]["step"], "the last model is the best: the run shows nothing"
    return best["step"], {"eval_loss": best["eval_loss"], "levenshtein": best["eval_levenshtein"]}


@pytest.mark.parametrize(("method", "name"), [("full", "florence2"), ("lora", "ofa")])
def test_metrics_and_answers_are_those_of_the_model_that_is_saved(
    method: str, name: str, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    # An adapter's loss falls here at any rate: the highest one is called the best.
    more = {**GROWING, "model.method": method, "training.greater_is_better": method == "lora"}
    more |= {"batch.image_size": 64} if name == "ofa" else {}
    out = run(tiny(name), "default", pairs, tmp_path / "run", eval_data=pairs, more=more)
    step, metrics = best_of(out, max if method == "lora" else min)
    # The result is in the base's float16, and so are its figures; the loss is that of training's arithmetic.
    metrics["levenshtein"] = out.metrics["levenshtein"]
    assert out.step == step and dict(out.metrics) == metrics
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    saved, checkpoint = (load_file(folder / weights) for folder in (out.directory, checkpoint_of(tmp_path, step)))
    same = [torch.equal(saved[name], tensor.to(saved[name].dtype)) for name, tensor in checkpoint.items()]
    assert all(same), "another model than the best is saved"
    for folder in (out.directory, tmp_path / "run"):
        assert json.loads((folder / "metrics.json").read_text()) == metrics
    record = json.loads((out.directory / "training.json").read_text())
    assert record["result_step"] == step and record["metrics"] == metrics and record["steps"] == 4

    words = ["--data", pairs, "--recipe", tmp_path / "run" / "recipe.yaml", "--json"]
    words = [out.directory, *words] if method == "full" else [tiny(name), "--adapter", out.directory, *words]
    measured = json.loads(CliRunner().invoke(cli.main, ["evaluate", *map(str, words)]).stdout)["metrics"]
    assert measured == pytest.approx({"levenshtein": metrics["levenshtein"]}, abs=1e-9)


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"checkpoint-{step}"


def test_report_and_terminal_say_at_which_step(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    words = [tiny("florence2"), "--data", pairs, "--eval-data", pairs, "-o", tmp_path / "run", "--recipe", "docvqa"]
    done = CliRunner().invoke(cli.port_finetune, [str(word) for word in [*words, *assigned(GROWING)]])
    assert done.exit_code == 0, done.output
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    rows = [row for row in history if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert f"the model of step {best['step']} of 4, the best by loss" in " ".join(done.output.split())
    figures = [line for line in done.output.splitlines() if line.startswith("measured")]
    assert figures and all(line.endswith(f"at step {best['step']}") for line in figures), figures
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    plain = html.unescape(re.sub("<[^>]+>", "", page))
    assert f"levenshtein, at step {best['step']}" in page
    answers = (tmp_path / "run" / "predictions" / f"step-{best['step']:06}.jsonl").read_text("utf-8").splitlines()
    for line in answers:
        assert json.loads(line)["text"] in plain


def test_card_publishes_the_figures_of_the_saved_model_and_their_step(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**GROWING, "evaluation.samples": 2}
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    step, _ = best_of(out)
    words = ["release", out.directory, "--repo", "somebody/model", "--licence", "mit", "--dry-run"]
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    card = done.output
    assert f"2 samples, by the model of step {step}, which is this one" in card
    assert json.dumps({"type": "levenshtein", "value": out.metrics["levenshtein"]}) in card


def test_best_step_without_a_checkpoint_is_not_claimed(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**GROWING, "training.save_steps": 4}
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    best, _ = best_of(out)
    last = [row for row in out.history if "eval_loss" in row][-1]
    assert out.step == 4 and out.metrics["eval_loss"] == last["eval_loss"]
    assert any(f"that of step {best}, where no checkpoint was saved" in note for note in out.notes)


def test_best_checkpoint_of_a_run_that_was_moved_is_found(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=GROWING)
    weights = (out.directory / "model.safetensors").read_bytes()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "moved", eval_data=pairs, resume=True, more=GROWING)
    assert again.step == out.step and again.metrics == out.metrics
    assert (again.directory / "model.safetensors").read_bytes() == weights


def test_resumed_report_still_has_the_answers(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {**GROWING, "training.load_best_model_at_end": False}
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    page = out.report.read_text("utf-8")
    assert page.count('class="sample"') == 4
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True, more=more)
    assert again.report.read_text("utf-8").count('class="sample"') == 4
