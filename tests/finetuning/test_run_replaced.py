"""A run that replaces a finished one: that one stays until there is something better."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_processes import killed_when
from tiny_runs import job_of, run

from weightport.errors import OutputError, TrainingError
from weightport.finetuning.training.resuming import last_checkpoint
from weightport.finetuning.training.trainer import PortTrainer

SHORT: dict[str, Any] = {
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 2,
    "training.max_steps": 3,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}
SAVED = {**SHORT, "training.save_strategy": "steps", "training.save_steps": 1}


@pytest.fixture
def finished(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> dict[str, bytes]:
    """A finished run in tmp_path/run: its files."""
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=SHORT)
    return contents(tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of this step, counted from 1, is no number."""
    real = PortTrainer.compute_loss

    def compute_loss(self: PortTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step + 1 == step and not isinstance(loss, tuple) else loss

    monkeypatch.setattr(PortTrainer, "compute_loss", compute_loss)


def test_a_run_that_fails_before_its_first_checkpoint_leaves_the_finished_one(
    finished: dict[str, bytes],
    tiny: Callable[[str], Path],
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, 2)
    with pytest.raises(TrainingError, match="nan at step 2"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", overwrite=True, more=SHORT)
    assert contents(tmp_path / "run") == finished
    assert os.listdir(tmp_path) == ["run"]


def test_a_run_that_fails_after_its_first_checkpoint_can_be_resumed_and_the_old_one_is_gone(
    finished: dict[str, bytes],
    tiny: Callable[[str], Path],
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        fail_at(patched, 2)
        with pytest.raises(TrainingError, match="nan at step 2"):
            run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", overwrite=True, more=SAVED)
    found = last_checkpoint(tmp_path / "run")
    assert found is not None and found.name == "checkpoint-1"
    assert not (tmp_path / "run" / "model").exists() and os.listdir(tmp_path) == ["run"]
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more=SAVED)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_run_that_is_killed_before_its_first_checkpoint_gives_way_to_the_finished_one(
    finished: dict[str, bytes], tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    late = {**SHORT, "training.max_steps": 1000}
    job = job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", overwrite=True, more=late)
    killed_when(job, lambda: not (tmp_path / "run" / "model").exists())
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() != finished["recipe.yaml"]
    with pytest.raises(OutputError, match="exists"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=SHORT)
    assert contents(tmp_path / "run") == finished
    assert os.listdir(tmp_path) == ["run"]


def test_a_result_that_the_user_changed_is_not_trained_over(
    finished: dict[str, bytes], tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"the user's own")
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="was changed since weightport wrote it"):
            run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=SHORT, **how)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == b"the user's own"


def test_what_a_run_writes_is_all_its_own(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    """Every file of a run with all that it may leave: it can be replaced, and nothing in it hinders that."""
    more = {**SAVED, "training.report_to": "tensorboard", "evaluation.metrics": ["levenshtein"]}
    more |= {"model.method": "lora", "training.eval_strategy": "steps", "training.eval_steps": 1}
    for overwrite in (False, True):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, overwrite=overwrite, more=more)
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "predictions").is_dir()
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, eval_data=pairs, more=more)
    assert os.listdir(tmp_path) == ["run"]
