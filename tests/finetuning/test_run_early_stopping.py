"""Runs that end when a figure no longer becomes better, and what the untrained model is measured at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_processes import killed_at
from tiny_runs import job_of, losses, run

from weightport.errors import RecipeError, TrainingError
from weightport.finetuning.setup.training_arguments import training_arguments

NO_PROGRESS = {
    "training.learning_rate": 0.0,
    "training.per_device_train_batch_size": 2,
    "training.max_steps": 6,
    "training.eval_strategy": "steps",
    "training.eval_steps": 1,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.save_total_limit": None,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    "evaluation.samples": 2,
    "evaluation.generation.max_new_tokens": 3,
    "evaluation.early_stopping_patience": 2,
}


def test_run_ends_after_as_many_evaluations_as_it_may_not_become_better(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=NO_PROGRESS)
    assert list(losses(out.history)) == [1, 2, 3]
    assert out.step == 1, "the result is not the best model"
    assert any(note.startswith("stopped early at step 3 of 6: loss was not better than") for note in out.notes)


def test_killed_run_goes_on_counting_where_it_was(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more = {**NO_PROGRESS, "training.load_best_model_at_end": False}
    killed_at(job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more), 2)
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True, more=more)
    assert list(losses(out.history)) == [1, 2, 3], "it began to count anew"


def test_stopped_run_takes_no_further_step_when_it_is_resumed(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=NO_PROGRESS)
    weights = (out.directory / "model.safetensors").read_bytes()
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True, more=NO_PROGRESS)
    assert losses(again.history) == losses(out.history)
    assert again.metrics == out.metrics
    assert (again.directory / "model.safetensors").read_bytes() == weights


def test_early_stopping_without_evaluations_is_refused(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"there is no evaluation data. Pass --eval-data or --eval-fraction"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=NO_PROGRESS)
    with pytest.raises(RecipeError, match=r"training.eval_strategy is no"):
        run(
            tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs,
            more={**NO_PROGRESS, "training.eval_strategy": "no"},
        )  # fmt: skip
    with pytest.raises(RecipeError, match=r"save_strategy is no and training\.eval_strategy is \w+\. Set both alike"):
        run(
            tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs,
            more={**NO_PROGRESS, "training.save_strategy": "no"},
        )  # fmt: skip
    with pytest.raises(RecipeError, match=r"metric_for_best_model is 'cider', and what is measured is loss, anls"):
        run(
            tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs,
            more={**NO_PROGRESS, "training.metric_for_best_model": "cider"},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_patience_is_refused_by_name(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**NO_PROGRESS, "training.max_steps": 1}
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    with pytest.raises(TrainingError, match=r"evaluation\.early_stopping_patience: 2 then, 3 now"):
        run(
            tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True,
            more={**more, "evaluation.early_stopping_patience": 3},
        )  # fmt: skip


@pytest.mark.parametrize(("metric", "higher"), [("json-edit", False), ("eval_count-error", False), ("anls", True)])
def test_best_is_the_lowest_of_a_metric_that_counts_errors(metric: str, higher: bool, tmp_path: Path) -> None:
    settings = {"metric_for_best_model": metric, "eval_strategy": "epoch", "save_strategy": "epoch"}
    arguments, _ = training_arguments(settings, tmp_path, evaluates=True, stops_early=True)
    assert arguments.greater_is_better is higher


def test_untrained_model_is_measured_and_the_losses_are_those_of_a_run_that_does_not(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**NO_PROGRESS, "training.learning_rate": 1e-3, "training.max_steps": 2}
    more["evaluation.early_stopping_patience"] = None
    plain = run(tiny("florence2"), "docvqa", pairs, tmp_path / "plain", eval_data=pairs, more=more)
    more["training.eval_on_start"] = True
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    assert losses(out.history) == losses(plain.history)
    before = [entry for entry in out.history if entry["step"] == 0]
    assert len(before) == 1 and before[0]["eval_loss"] > out.metrics["eval_loss"]
    record = json.loads((out.directory / "training.json").read_text())
    assert record["metrics_untrained"]["eval_loss"] == before[0]["eval_loss"]
    assert record["metrics_untrained"].keys() == out.metrics.keys()
    assert f"before the first step: eval_loss {before[0]['eval_loss']:.4g}" in out.report.read_text("utf-8")
    assert (tmp_path / "run" / "predictions" / "step-000000.jsonl").is_file()

    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True, more=more)
    assert [entry for entry in again.history if entry["step"] == 0] == before
