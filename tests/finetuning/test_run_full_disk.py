"""A disk that is full at the end does not cost the trained model: it is whole where the error says."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tiny_runs import assigned, trained_model
from transformers import PreTrainedModel, Trainer

from weightport import cli
from weightport.errors import DataError, OutputError
from weightport.finetuning import rescue
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.evaluation import answering
from weightport.finetuning.rescue import disk_fault
from weightport.finetuning.training import results
from weightport.finetuning.training.run import _disk_faults_named

FEW = {
    "training.max_steps": 2,
    "training.save_strategy": "no",
    "training.warmup_steps": 0,
    "training.dataloader_num_workers": 0,
    "evaluation.metrics": ["levenshtein"],
}


@pytest.fixture
def other_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first place where a trained model may go."""
    folder = tmp_path / "other disk"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def finetune(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> Callable[..., Result]:
    def call(*words: object, **settings: Any) -> Result:
        arguments = [tiny("ofa"), "--data", pairs, "--eval-data", pairs, "-o", tmp_path / "run", *words]
        arguments += assigned({**FEW, "batch.image_size": 64, **settings})
        return CliRunner().invoke(cli.port_finetune, [str(each) for each in arguments])

    return call


def fill_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of models and adapters that would go below `folder` find no space left on the device."""
    from peft import PeftModel

    for kind in (PreTrainedModel, PeftModel):
        save = kind.save_pretrained

        def full(model: Any, place: Any, *args: Any, save: Any = save, **kwargs: Any) -> None:
            if Path(place).is_relative_to(folder):
                raise OSError(errno.ENOSPC, "No space left on device")
            save(model, place, *args, **kwargs)

        monkeypatch.setattr(kind, "save_pretrained", full)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_trained_model_is_whole_where_the_error_says(
    method: str,
    finetune: Callable[..., Result],
    other_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    models = trained_model(monkeypatch)
    fill_disk(tmp_path / "run", monkeypatch)
    done = finetune("--method", method)
    assert done.exit_code == 1 and "Traceback" not in done.output and "defect" not in done.output, done.output
    assert f"The disk of {tmp_path / 'run'} is full. The trained model is whole" in done.output
    (place,) = other_disk.iterdir()
    assert f"cp -r '{place}' {tmp_path / 'run'}-rescued" in done.output
    result = place / ("model" if method == "full" else "adapter")
    names = {path.name for path in place.iterdir()}
    assert names == {result.name, "metrics.json", "history.json", "report.html", "recipe.yaml", "predictions"}
    (weights,) = (load_file(path) for path in result.glob("*.safetensors"))
    trained = {name.replace(".default", ""): tensor for name, tensor in models[0].state_dict().items()}
    assert weights and all(torch.equal(tensor, trained[name]) for name, tensor in weights.items())
    assert json.loads((place / "metrics.json").read_text()).keys() == {"eval_loss", "levenshtein"}
    assert not (tmp_path / "run").exists(), "a folder without a result is left on the full disk"


def test_place_without_room_is_passed_over_and_none_is_said(
    finetune: Callable[..., Result], other_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "third").mkdir()
    monkeypatch.setattr(rescue, "_places", lambda: iter([other_disk, tmp_path / "third"]))
    fill_disk(tmp_path / "run", monkeypatch)
    usage = shutil.disk_usage
    little = usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rescue.shutil, "disk_usage", lambda path: little if path == other_disk else usage(path))
    done = finetune()
    assert done.exit_code == 1 and not list(other_disk.iterdir())
    (place,) = (tmp_path / "third").iterdir()
    assert (place / "model" / "model.safetensors").is_file() and str(place) in done.output

    fill_disk(tmp_path, monkeypatch)
    shutil.rmtree(place)
    done = finetune()
    assert done.exit_code == 1 and "no room for the trained model" in done.output and "TMPDIR" in done.output
    assert not list((tmp_path / "third").iterdir()), "half a model is left behind"


def test_checkpoint_of_the_last_step_that_finds_no_space_costs_the_checkpoint_alone(
    finetune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = Trainer._save_optimizer_and_scheduler

    def full(trainer: Trainer, folder: str) -> None:
        if trainer.state.global_step == 2:
            raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed")
        save(trainer, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    for saved in (1, 2):
        done = finetune("--overwrite", **{"training.save_strategy": "steps", "training.save_steps": saved})
        assert done.exit_code == 0, done.output
        assert "the checkpoint of step 2 is not kept: the disk was full" in done.output
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
        left = [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")]
        assert left == (["checkpoint-1"] if saved == 1 else [])


def test_answers_that_find_no_space_do_not_end_the_run(
    finetune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(row: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(answering, "asdict", full)
    done = finetune()
    monkeypatch.undo()
    assert done.exit_code == 0, done.output
    assert re.search(r"answers at step 2 are not kept: .*disk is full", " ".join(done.output.split())), done.output
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert 'class="sample"' in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_picture_that_is_gone_at_the_end_does_not_cost_the_model(
    finetune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    summary = results._summary

    def gone(picture: Picture) -> Any:
        raise DataError("the image is gone")

    def with_pictures_gone(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Picture, "read", gone)
            return summary(*args)

    monkeypatch.setattr(results, "_summary", with_pictures_gone)
    done = finetune()
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_adapter_needs_the_space_of_an_adapter(
    finetune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    epochs = {"training.save_strategy": "steps", "training.save_steps": 1}
    assert "free, and the result with" in finetune(**epochs).output
    done = finetune("--method", "lora", "--set", "lora.r=1", **epochs)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EIO, "Input/output error"), "failed, or one that is read from (input/output error)"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (RuntimeError("basic_ios::clear: iostream error"), "did not take what was written (it is full, or failed)"),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("mat1 and mat2"), None),
    ],
)
def test_a_disk_s_fault_is_told_from_others(error: Exception, says: str | None) -> None:
    assert disk_fault(error) == says
    wrapped = RuntimeError("saving")
    wrapped.__cause__ = error
    assert disk_fault(wrapped) == says


def test_a_checkpoint_that_the_disk_did_not_take_is_one_error(tmp_path) -> None:
    said = pytest.raises(OutputError, match=r"The disk of .*run did not take .* Nothing was left behind")
    with said, _disk_faults_named(tmp_path / "run"):
        raise RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError, match="mat1"), _disk_faults_named(tmp_path / "run"):
        raise RuntimeError("mat1 and mat2")
