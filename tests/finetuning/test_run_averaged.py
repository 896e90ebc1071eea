"""The moving average of the weights: what it is, where it is measured and saved, and that it survives a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_processes import killed_at, killed_when, side_by_side
from tiny_runs import job_of, losses, run, still

from weightport.errors import RecipeError, TrainingError

DECAY = 0.2
AVERAGED = {
    "training.learning_rate": 1e-2,
    "training.lr_scheduler_type": "constant",
    "training.per_device_train_batch_size": 1,
    "training.max_steps": 4,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.save_total_limit": None,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    "evaluation.samples": 2,
    "evaluation.generation.max_new_tokens": 3,
    "model.ema_decay": DECAY,
}


def by_hand(run_folder: Path, base: Path, data: Path, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """The average of the weights that the checkpoints hold, from those of the base on."""
    more = {**AVERAGED, "model.ema_decay": None, "training.learning_rate": 0.0, "training.max_steps": 1}
    run(base, "docvqa", data, folder / "base", more=more)
    average = load_file(folder / "base" / "checkpoints" / "checkpoint-1" / "model.safetensors")
    for step in range(1, steps + 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        now = load_file(run_folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        for name, each in now.items():
            average[name] = decay * average[name] + (1 - decay) * each
    return average


def test_result_is_the_average_of_the_steps_weights_and_so_is_what_is_measured(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=AVERAGED)
    expected = by_hand(tmp_path / "run", tiny("florence2"), pairs, tmp_path, 4)
    averages = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "ema.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert averages and not any(torch.equal(each, last[name]) for name, each in averages.items() if each.any())
    found = load_file(out.directory / "model.safetensors")
    for name, each in averages.items():
        torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=0)
        assert torch.equal(found[name], each.to(found[name].dtype)), "the result is another than the average"

    def loss_of(model: Path, name: str, **settings: object) -> float:
        more = {**AVERAGED, "model.ema_decay": None, **{f"training.{key}": each for key, each in settings.items()}}
        return run(model, "docvqa", pairs, tmp_path / name, eval_data=pairs, more=more).metrics["eval_loss"]

    # The result is rounded to its base's dtype, in which nothing is measured here.
    assert loss_of(out.directory, "measured", learning_rate=0.0, max_steps=1) == pytest.approx(
        out.metrics["eval_loss"], abs=5e-3
    )
    assert abs(loss_of(tiny("florence2"), "plain") - out.metrics["eval_loss"]) > 5e-2
    assert any("moving average of the weights (model.ema_decay 0.2)" in note for note in out.notes)


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_killed_and_resumed_run_has_the_average_of_an_uninterrupted_one(
    method: str, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**AVERAGED, "model.method": method}
    whole = run(tiny("florence2"), "docvqa", pairs, tmp_path / "whole", more=more)
    killed_at(job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "killed", more=more), 2)
    resumed = run(tiny("florence2"), "docvqa", pairs, tmp_path / "killed", resume=True, more=more)
    assert losses(resumed.history) == losses(whole.history)
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (resumed.directory / file).read_bytes() == (whole.directory / file).read_bytes()
    last = Path("checkpoints") / "checkpoint-4" / "ema.safetensors"
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_run_that_was_killed_while_it_saved_goes_on_from_the_checkpoint_before(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    whole = run(tiny("florence2"), "docvqa", pairs, tmp_path / "whole", more=AVERAGED)
    third = tmp_path / "killed" / "checkpoints" / "checkpoint-3"
    # The weights are written first, and the state that makes a checkpoint whole last.
    killed_when(job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "killed", more=AVERAGED), third.is_dir)
    (third / "ema.safetensors").write_bytes(b"\0" * 9)
    (third / "trainer_state.json").unlink(missing_ok=True)
    resumed = run(tiny("florence2"), "docvqa", pairs, tmp_path / "killed", resume=True, more=AVERAGED)
    assert losses(resumed.history) == losses(whole.history)
    weights = [(each.directory / "model.safetensors").read_bytes() for each in (whole, resumed)]
    assert weights[0] == weights[1]


def test_best_model_is_the_average_of_its_step(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more = {**AVERAGED, "training.learning_rate": 0.3, "training.max_steps": 3, "model.dtype": "float32"}
    # Which step is best is then no matter of how many random numbers a version of transformers draws.
    more |= still(tiny("florence2"))
    more |= {"training.eval_strategy": "steps", "training.eval_steps": 1, "training.load_best_model_at_end": True}
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    losses_at = {entry["step"]: entry["eval_loss"] for entry in out.history if "eval_loss" in entry}
    assert out.step == min(losses_at, key=lambda step: losses_at[step]) < 3, "the rate is no longer too high"
    assert out.metrics["eval_loss"] == losses_at[out.step]
    best = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{out.step}" / "ema.safetensors")
    found = load_file(out.directory / "model.safetensors")
    shared = found.keys() & best.keys()
    assert shared
    for name in shared:
        assert torch.equal(found[name], best[name].to(found[name].dtype)), name


def test_two_processes_keep_one_average(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more = {**AVERAGED, "training.max_steps": 2}
    assert side_by_side(job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "two", more=more), 2) == [0, 0]
    expected = by_hand(tmp_path / "two", tiny("florence2"), pairs, tmp_path, 2)
    averages = load_file(tmp_path / "two" / "checkpoints" / "checkpoint-2" / "ema.safetensors")
    for name, each in averages.items():
        torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=0)


def test_checkpoint_without_its_average_is_no_place_to_go_on_from(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**AVERAGED, "training.max_steps": 2}
    run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=more)
    with pytest.raises(TrainingError, match=r"model\.ema_decay: 0\.2 then, None now"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more={**more, "model.ema_decay": None})
    (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "ema.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-2 has no whole ema\.safetensors"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more=more)


def test_decay_that_is_none_and_shared_out_weights_are_refused(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    for decay in (0, 1, 1.5):
        with pytest.raises(RecipeError, match=rf"model\.ema_decay is {decay:g}\. It lies between 0 and 1"):
            run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**AVERAGED, "model.ema_decay": decay})
    with pytest.raises(RecipeError, match=r"model\.ema_decay averages whole weights .* FSDP shares them out"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**AVERAGED, "training.fsdp": True})
