"""The same run twice, and a run that was killed: the same losses, bit for bit, with dropout on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_processes import killed_at
from tiny_runs import EVERY_RECIPE, RECIPES, job_of, losses, run

from weightport.errors import TrainingError
from weightport.finetuning.training.resuming import last_checkpoint

SHORT = {
    "training.learning_rate": 1e-3,
    "training.per_device_train_batch_size": 1,
    "training.max_steps": 6,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.save_total_limit": None,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_killed_and_resumed_run_has_the_losses_of_an_uninterrupted_one(
    name: str, tiny: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, model, data, settings = RECIPES[name]
    source = request.getfixturevalue(data)
    more = {**SHORT, **settings}
    whole = run(tiny(model), recipe, source, tmp_path / "whole", more=more)
    killed_at(job_of(tiny(model), recipe, source, tmp_path / "killed", more=more), 2)
    assert not any((tmp_path / "killed" / name).exists() for name in ("model", "adapter")), (
        "a killed run has left a result"
    )

    resumed = run(tiny(model), recipe, source, tmp_path / "killed", resume=True, more=more)
    assert len(losses(whole.history)) == SHORT["training.max_steps"]
    assert losses(resumed.history) == losses(whole.history)
    result = whole.directory.name
    files = {"model": ("model.safetensors", "config.json", "generation_config.json"),
             "adapter": ("adapter_model.safetensors", "adapter_config.json")}  # fmt: skip
    for file in (f"{result}/{name}" for name in files[result]):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_recipe_file_of_a_run_gives_the_same_run(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    first = run(tiny("florence2"), "docvqa", pairs, tmp_path / "a", eval_data=pairs, more=SHORT)
    again = run(tiny("florence2"), tmp_path / "a" / "recipe.yaml", pairs, tmp_path / "b", eval_data=pairs)
    assert losses(again.history) == losses(first.history)
    assert again.metrics == first.metrics
    weights = [(tmp_path / each / "model" / "model.safetensors").read_bytes() for each in "ab"]
    assert weights[0] == weights[1]


def test_seed_decides_the_losses(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    def seen(name: str, seed: int) -> dict[int, float]:
        return losses(run(tiny("florence2"), "docvqa", pairs, tmp_path / name, seed=seed, more=SHORT).history)

    first = seen("a", 1)
    assert seen("b", 1) == first
    assert seen("c", 2) != first


def test_checkpoint_that_was_being_written_is_passed_over(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    whole = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=SHORT)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    (checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    (checkpoints / "checkpoint-99").mkdir()
    assert last_checkpoint(tmp_path / "run") == checkpoints / "checkpoint-2"
    resumed = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more=SHORT)
    assert losses(resumed.history) == losses(whole.history)


def test_run_without_a_checkpoint_is_resumed_from_its_beginning(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    whole = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**SHORT, "training.save_strategy": "no"})
    resumed = run(
        tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more={**SHORT, "save_strategy": "no"}
    )
    assert losses(resumed.history) == losses(whole.history)


def test_resuming_with_another_setting_is_refused_by_name(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=SHORT)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(TrainingError, match=r"training\.learning_rate: 0\.001 then, 0\.5 now"):
        run(
            tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True,
            more={**SHORT, "training.learning_rate": 0.5},
        )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resuming_on_other_data_is_refused_and_on_moved_data_is_noted(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=SHORT)
    moved = Path(shutil.copytree(pairs.parent, tmp_path / "moved")) / pairs.name
    resumed = run(tiny("florence2"), "docvqa", moved, tmp_path / "run", resume=True, more=SHORT)
    assert any(f"was started with data {pairs}, and goes on with {moved}" in note for note in resumed.notes)
    moved.write_text("".join(moved.read_text("utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"was started on 4 samples .* there are 3 now"):
        run(tiny("florence2"), "docvqa", moved, tmp_path / "run", resume=True, more=SHORT)


def test_resuming_on_other_labels_is_refused(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pairs.parent, tmp_path / "data")) / pairs.name
    run(tiny("florence2"), "docvqa", data, tmp_path / "run", more=SHORT)
    data.write_text(data.read_text("utf-8").replace("red cat on mat", "red dog on mat"), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"holds other questions, answers or pictures now: their fingerprints"):
        run(tiny("florence2"), "docvqa", data, tmp_path / "run", resume=True, more=SHORT)


def test_resuming_with_other_evaluation_data_is_noted(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(pairs.parent, tmp_path / "data")) / pairs.name
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=data, more=SHORT)
    data.write_text(data.read_text("utf-8").replace("red cat on mat", "red dog on mat"), encoding="utf-8")
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=data, resume=True, more=SHORT)
    assert any("earlier figures do not compare" in note for note in again.notes)


def test_resuming_without_a_checkpoint_says_that_it_begins_again(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**SHORT, "training.save_strategy": "no", "training.max_steps": 1}
    assert not run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=more).notes
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more=more)
    assert again.notes == ("there is no checkpoint to resume from: the run begins again at its first step",)


def test_resuming_what_is_no_run_is_refused(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is not a run that could be resumed"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "nothing", resume=True, more=SHORT)


def test_finished_run_is_resumed_to_the_same_result(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    whole = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=SHORT)
    weights = (whole.directory / "model.safetensors").read_bytes()
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True, more=SHORT)
    assert (again.directory / "model.safetensors").read_bytes() == weights
    assert again.metrics == whole.metrics
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == dict(whole.metrics)
