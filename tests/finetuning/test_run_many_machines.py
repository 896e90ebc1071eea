"""Weights shared out by FSDP2, two machines under torchrun, and checkpoints taken up by another number of processes:
always the losses of one process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_processes import side_by_side
from tiny_runs import FOUR_STEPS, assigned, job_of, losses, run, still
from torch import nn

from weightport.errors import RecipeError
from weightport.finetuning.training.sharding import tied_modules

STEPS = {**FOUR_STEPS, "training.per_device_train_batch_size": 4}
CLOSE = {"abs": 1e-6, "rel": 5e-7}
"""As in test_run_processes.py: losses of about 10 have neighbours 1e-6 away in float32."""


def settings(model: Path, batch: int, steps: int = 4, **more: Any) -> dict[str, Any]:
    """Settings of a run without anything random; `more` with `__` for the dot."""
    return {
        **STEPS,
        **still(model),
        "training.per_device_train_batch_size": batch,
        "training.max_steps": steps,
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def stopped_after_two_steps(folder: Path) -> None:
    """Leave a run's folder as it was after its second step."""
    newest = folder / "checkpoints" / "checkpoint-4"
    assert newest.is_dir()
    newest.rename(folder / "checkpoints" / "tmp-checkpoint-4")


@pytest.mark.parametrize("name", ["florence2", pytest.param("ofa-cn", marks=pytest.mark.slow)])
def test_shared_out_weights_have_the_losses_and_the_result_of_whole_ones(
    name: str, tiny: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = tiny(name)
    recipe, fixture, more = ("docvqa", "pairs", {})
    if name == "ofa-cn":
        recipe, fixture, more = "muge-caption", "muge", {"batch__image_size": 64}
    data = request.getfixturevalue(fixture)
    one = run(model, recipe, data, tmp_path / "one", eval_data=data, more=settings(model, 4, **more))
    shared = settings(model, 2, training__fsdp=True, **more)
    assert side_by_side(job_of(model, recipe, data, tmp_path / "two", eval_data=data, more=shared), 2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(one.history), **CLOSE)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(one.metrics["eval_loss"], abs=1e-5)
    lines = sorted((tmp_path / "two" / "predictions").iterdir())[-1].read_text().splitlines()
    assert len(lines) == 3, "a process that had less to answer answered twice"
    result = tmp_path / "two" / "model"
    expected, found = load_file(one.directory / "model.safetensors"), load_file(result / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, each in found.items():
        assert each.dtype == expected[key].dtype
        torch.testing.assert_close(each.float(), expected[key].float(), atol=2e-3, rtol=0)
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()

    # What two processes wrote, four of them take up, with the samples of a step that there were.
    stopped_after_two_steps(tmp_path / "two")
    job = job_of(model, recipe, data, tmp_path / "two", eval_data=data, resume=True, more=shared)
    assert side_by_side(job, 4) == [0] * 4
    assert losses(tmp_path / "two") == pytest.approx(losses(one.history), **CLOSE)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_a_run(
    before: int, after: int, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    model = tiny("florence2")
    whole = run(model, "docvqa", pairs, tmp_path / "whole", more=settings(model, 4))
    more = settings(model, 4 // before)
    first = job_of(model, "docvqa", pairs, tmp_path / "run", more=more)
    assert side_by_side(first, before) == [0] * before
    stopped_after_two_steps(tmp_path / "run")
    job = job_of(model, "docvqa", pairs, tmp_path / "run", resume=True, more=more)
    assert side_by_side(job, after) == [0] * after
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.history), **CLOSE)
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert (record["processes"], record["samples_per_step"]) == (after, 4)
    processes = "1 process" if before == 1 else "2 processes"
    assert any(note.startswith(f"the run was started in {processes}: ") for note in record["notes"]), record["notes"]


def test_modules_that_share_a_parameter_are_one_group() -> None:
    model = nn.ModuleDict({name: nn.Embedding(4, 2) for name in ("a", "b", "c", "d")})
    model["head"] = nn.Linear(2, 4)
    model["b"].weight = model["c"].weight
    assert tied_modules(model) == [[model["b"], model["c"]]]
    model["head"].weight = model["b"].weight
    assert tied_modules(model) == [[model["b"], model["c"], model["head"]]]
    model["other"] = nn.Linear(2, 4)
    model["other"].bias = model["head"].bias
    assert tied_modules(model) == [[model["b"], model["c"], model["head"], model["other"]]]


@pytest.mark.slow
def test_two_machines_under_torchrun_train_once_and_write_once(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    model = tiny("florence2")
    one = run(model, "docvqa", pairs, tmp_path / "one", eval_data=pairs, more=settings(model, 4, 2))
    more = assigned(settings(model, 2, 2))
    done = under_torchrun([str(model), "--data", str(pairs), "--eval-data", str(pairs), "-o", str(tmp_path / "two"),
                           "--recipe", "docvqa", "--json", *more])  # fmt: skip
    assert [each.returncode for each in done] == [0, 0], "\n".join(each.stderr for each in done)
    assert losses(tmp_path / "two") == pytest.approx(losses(one.history), **CLOSE)
    assert [bool(each.stdout.strip()) for each in done] == [True, False]
    assert json.loads(done[0].stdout)["metrics"]["eval_loss"] == pytest.approx(one.metrics["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_folder_that_is_not_converted_is_named_once_on_each_machine(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text('{"model_type": "florence2"}')
    for model, words in (("original", "port-finetune:"), ("nowhere", "does not exist")):
        done = under_torchrun([str(tmp_path / model), "--data", str(pairs), "-o", str(tmp_path / "run")], local=2)
        assert all(each.returncode for each in done)
        said = "".join(each.stderr for each in done)
        # The launcher of the second machine may end its processes before one of them speaks.
        assert 1 <= said.count(words) <= 2, said
    assert not (tmp_path / "run").exists()


def under_torchrun(arguments: list[str], local: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """port-finetune under two launchers that know each other by the loopback device, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, command = (str(Path(sys.executable).with_name(name)) for name in ("torchrun", "port-finetune"))
    running = [
        subprocess.Popen(
            [program, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(local),
             "--master-addr", "127.0.0.1", "--master-port", str(port), command, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    found = []
    for process in running:
        out, errors = process.communicate(timeout=400)
        found.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
    return found


def test_deepspeed_that_is_not_installed_is_refused_by_name(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"training.deepspeed": {"zero_optimization": {"stage": 2}}}
    monkeypatch.setattr("weightport.finetuning.setup.training_arguments.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"training\.deepspeed needs DeepSpeed, which is not installed: pip install"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, **asked})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match=r"accelerate's configuration .* needs DeepSpeed"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=STEPS)
    assert not (tmp_path / "run").exists()
