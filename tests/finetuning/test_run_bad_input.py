"""What a run refuses: one clear error, the right exit status, no traceback, and nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from drawn_data import draw_jsonl, write_lines
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from weightport import cli

FEW = (
    "warmup_steps=0", "max_steps=3", "save_strategy=no", "logging_steps=1", "dataloader_num_workers=0",
    "per_device_train_batch_size=2",
)  # fmt: skip


@pytest.fixture
def finetune(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> Callable[..., Result]:
    """`port-finetune MODEL --data … -o tmp_path/run` with a few steps; words are added to it."""

    def call(*words: Any, model: Path | None = None, data: Path | str | None = None, steps: Any = FEW) -> Result:
        arguments = [model or tiny("florence2"), "--data", data or pairs, "-o", tmp_path / "run"]
        arguments += [word for each in steps for word in ("--set", each)]
        return CliRunner().invoke(cli.port_finetune, [str(each) for each in (*arguments, *words)])

    return call


def refused(done: Result, status: int, *parts: str) -> None:
    """One error with these parts, no traceback, no defect."""
    assert done.exit_code == status, done.output
    for part in parts:
        assert part in done.output, done.output
    assert "Traceback" not in done.output and "defect" not in done.output, done.output
    assert done.output.count("port-finetune: ") <= 1, done.output


USAGE = {
    "recipe": (["--recipe", "docvqua"], ["no recipe 'docvqua'", "docvqa"]),
    "recipe file": (["--recipe", "missing.yaml"], ["missing.yaml", "cannot be read"]),
    "key": (["--set", "learning_rat=1"], ["no setting 'learning_rat' (did you mean training.learning_rate?)."]),
    "part of a key": (["--set", "epochs=1"], ["no setting 'epochs'", "training.num_train_epochs"]),
    "key of generate": (["--set", "max_new_token=1"], ["evaluation.generation.max_new_tokens"]),
    "ambiguous key": (["--set", "seed"], ["expected key=value"]),
    "our own argument": (["--set", "training.output_dir=/tmp"], ["no setting 'training.output_dir'"]),
    "number": (["--set", "learning_rate=fast"], ["training.learning_rate", "number", "'fast'"]),
    "negative number": (["--set", "learning_rate=-1"], ["training.learning_rate", "-1"]),
    "whole number": (["--set", "evaluation.samples=2.5"], ["evaluation.samples", "whole number"]),
    "nothing to answer": (["--set", "evaluation.samples=0"], ["evaluation.samples", "1 or more"]),
    "no batch": (["--set", "evaluation.batch_size=0"], ["evaluation.batch_size"]),
    "empty batch": (["--set", "per_device_train_batch_size=0"], ["per_device_train_batch_size"]),
    "truth": (["--set", "batch.count_padding=maybe"], ["batch.count_padding", "true or false"]),
    "list for text": (["--set", "batch.prompt=[a, b]"], ["batch.prompt", "text"]),
    "number for a mapping": (["--set", "model.config=5"], ["model.config"]),
    "number for names": (["--set", "model.freeze=5"], ["no freeze target '5'"]),
    "yaml": (["--set", "batch.prompt=[a"], ["no YAML"]),
    "choice": (["--set", "model.dtype=float8"], ["model.dtype", "float32"]),
    "scheduler": (["--set", "lr_scheduler_type=zigzag"], ["zigzag", "cosine"]),
    "own scheduler": (
        ["--set", "lr_scheduler_type=progress_cosine", "--set", "lr_scheduler_kwargs={num_cycles: 1}"],
        ["progress_cosine", "min_lr_rate, warmup_lr_rate, cosine_share"],
    ),
    "own scheduler's rate": (
        ["--set", "lr_scheduler_type=progress_cosine", "--set", "lr_scheduler_kwargs={min_lr_rate: 3}"],
        ["lr_scheduler_kwargs.min_lr_rate is 3", "from 0 to 1"],
    ),
    "reporting": (["--set", "report_to=telegraph"], ["training.report_to", "telegraph"]),
    "optimizer": (["--set", "optim=magic"], ["magic"]),
    "freeze target": (["--freeze", "tower"], ["no freeze target 'tower'", "vision"]),
    "metric": (["--set", "evaluation.metrics=[bleu-5]"], ["bleu-5", "bleu-4"]),
    "generation setting": (["--set", "evaluation.generation.num_beam=3"], ["num_beam"]),
    "generation value": (["--set", "evaluation.generation.num_beams=-2"], ["num_beams"]),
    "config field": (["--set", "model.config.quux=1"], ["model.config.quux"]),
    "config field elsewhere": (["--set", "model.config.dropout=0"], ["model.config.text_config.dropout"]),
    "config value": (["--set", "model.config.text_config.dropout=much"], ["model.config.text_config.dropout", "much"]),
    "image size": (["--set", "batch.image_size=50"], ["batch.image_size", "multiple of 32"]),
    "image too large": (["--set", "batch.image_size=99968"], ["batch.image_size", "up to"]),
    "task": (["--set", "batch.task=dance", "--set", "batch.prompt=null"], ["no task 'dance'"]),
    "strategies that disagree": (
        ["--set", "load_best_model_at_end=true", "--set", "eval_strategy=epoch", "--set", "save_strategy=steps",
         "--eval-data", "SAME"], ["save_strategy is steps and", "eval_strategy is epoch", "Set both alike"],
    ),
    "best by no metric": (
        ["--set", "load_best_model_at_end=true", "--set", "metric_for_best_model=beauty",
         "--set", "save_strategy=epoch", "--eval-data", "SAME"], ["beauty", "exact-match"],
    ),
    "both": (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
}  # fmt: skip


@pytest.mark.parametrize("what", USAGE)
def test_what_cannot_be_asked_for_is_a_usage_error(
    what: str, finetune: Callable[..., Result], pairs: Path, tmp_path: Path
) -> None:
    words, parts = USAGE[what]
    done = finetune(*[str(pairs) if word == "SAME" else word for word in words])
    refused(done, 2, *parts)
    assert not (tmp_path / "run").exists()


RECIPE_FILES = {
    "no yaml": ("name: [", "is no YAML"),
    "no sections": ("- 1", "is no recipe"),
    "unknown section": ("name: a\ntitle: b\nfamilies: [florence2]\ntrainning: {}", "'trainning' is no section"),
    "no family": ("name: a\ntitle: b", "has no 'families'"),
    "another family": ("name: a\ntitle: b\nfamilies: [ofa]", "is for ofa"),
    "section is no mapping": ("name: a\ntitle: b\nfamilies: [florence2]\ntraining: 3", "training"),
    "families is text": ("name: a\ntitle: b\nfamilies: florence2", "families"),
    "family is text": ("name: a\ntitle: b\nfamilies: {florence2: x}", "families"),
    "published is text": ("name: a\ntitle: b\nfamilies: [florence2]\npublished: x", "published"),
    "key of a number": ("name: a\ntitle: b\nfamilies: [florence2]\ntraining: {3: 4}", "3"),
    "empty": ("", "is no recipe"),
}


@pytest.mark.parametrize("what", RECIPE_FILES)
def test_recipe_file_that_is_none_is_refused(what: str, finetune: Callable[..., Result], tmp_path: Path) -> None:
    text, part = RECIPE_FILES[what]
    (tmp_path / "own.yaml").write_text(text, "utf-8")
    refused(finetune("--recipe", tmp_path / "own.yaml"), 2, part)
    assert not (tmp_path / "run").exists()


def test_recipe_of_another_family_says_whose_it_is(finetune: Callable[..., Result], tmp_path: Path) -> None:
    refused(finetune("--recipe", "muge-caption"), 2, "is for ofa", "florence2")
    assert not (tmp_path / "run").exists()


def spoil_nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def no_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def broken_processor(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{}}")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "decoder.layers.0" in name)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (spoil_nothing, "does not exist"),
    "no config": (spoil_config, "config.json"),
    "broken config": (break_config, "config.json"),
    "other family": (other_family, "'bert'"),
    "no processor": (no_processor, "processor_config.json"),
    "broken processor": (broken_processor, "processor"),
    "no tokenizer": (no_tokenizer, "tokenizer"),
    "adapter": (an_adapter, "port-merge-lora"),
    "no weights": (no_weights, "model.safetensors"),
    "half the weights": (half_the_weights, "truncated or damaged; fetch it again"),
    "missing tensor": (missing_tensor, "decoder.layers.0"),
}


@pytest.mark.parametrize("what", MODELS)
def test_what_is_no_whole_model_directory_is_refused(
    what: str, finetune: Callable[..., Result], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    spoil, part = MODELS[what]
    shutil.copytree(tiny("florence2"), tmp_path / "model")
    spoil(tmp_path / "model")
    # A path that is not there is a mistake in the command; what stands there and is no model is a failure.
    refused(finetune(model=tmp_path / "model"), 2 if what == "nothing" else 1, part)
    assert not (tmp_path / "run").exists()


def test_attention_that_there_is_not_is_refused(finetune: Callable[..., Result], tmp_path: Path) -> None:
    # A setting that cannot be, like every other: no failure of the model.
    refused(finetune("--set", "model.attention=quantum"), 2, "model.attention", "quantum", "sdpa")
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_are_named_by_file_and_line(finetune: Callable[..., Result], tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path / "data")
    good = path.read_text("utf-8").splitlines()
    spoiled = {
        "missing image": ('{"image": "9.png", "prefix": "a", "suffix": "b"}', ["line 2", "9.png"]),
        "broken line": ('{"image": ', ["line 2"]),
        "empty answer": ('{"image": "1.png", "prefix": "a", "suffix": ""}', ["line 2"]),
        "other columns": ('{"picture": "1.png", "text": 5}', ["line 2"]),
    }
    for line, parts in spoiled.values():
        write_lines(path, [good[0], line, *good[2:]])
        refused(finetune(data=path), 1, "annotations.jsonl", *parts)
        assert not (tmp_path / "run").exists()
    refused(finetune(data=tmp_path / "nowhere.jsonl"), 2, "does not exist")
    refused(finetune("--eval-data", tmp_path / "nowhere.jsonl"), 2, "does not exist")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_picture_met_on_the_way_is_named_and_can_be_skipped(
    workers: int, finetune: Callable[..., Result], tmp_path: Path
) -> None:
    path = draw_jsonl(tmp_path / "data")
    (tmp_path / "data" / "2.png").write_bytes(b"this is no picture")
    more = ("--set", f"dataloader_num_workers={workers}")
    done = finetune(*more, data=path)
    refused(done, 1, "annotations.jsonl, line 3", "2.png", "--skip-bad")
    assert not (tmp_path / "run").exists(), "a run that could not be is left behind"
    skipping = finetune("--skip-bad", "1", *more, data=path)
    assert skipping.exit_code == 0, skipping.output
    assert "1 sample was left out" in skipping.output, skipping.output


def test_broken_picture_among_accumulated_batches_is_named(finetune: Callable[..., Result], tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path / "data", 8)
    (tmp_path / "data" / "6.png").write_bytes(b"this is no picture")
    more = ("--set", "gradient_accumulation_steps=4")
    refused(finetune(*more, data=path), 1, "annotations.jsonl, line 7", "6.png", "--skip-bad")
    assert finetune(*more, "--skip-bad", "1", data=path).exit_code == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_next_good_sample_takes_the_place_of_a_bad_one_that_is_a_batch_alone(
    workers: int, finetune: Callable[..., Result], tmp_path: Path
) -> None:
    path = draw_jsonl(tmp_path / "data", 5)
    for number in (1, 4):
        (tmp_path / "data" / f"{number}.png").write_bytes(b"this is no picture")
    more = ["--set", "per_device_train_batch_size=1", "--set", f"dataloader_num_workers={workers}"]
    more += ["--set", "max_steps=5", "--set", "per_device_eval_batch_size=1", "--eval-data", str(path)]
    refused(finetune("--skip-bad", "1", *more, data=path), 1, "More than 1 samples are bad")
    done = finetune("--skip-bad", "2", *more, data=path)
    assert done.exit_code == 0, done.output
    assert "2 samples were left out while training" in done.output
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len([row for row in history if "loss" in row]) == 5

    good = [line for n, line in enumerate(path.read_text("utf-8").splitlines()) if n not in (1, 4)]
    write_lines(path, good)
    again = finetune("--overwrite", "--set", "learning_rate=0", *more, data=path)
    assert again.exit_code == 0, again.output
    without = json.loads((tmp_path / "run" / "metrics.json").read_text())
    write_lines(path, [good[0], good[0].replace("0.png", "1.png"), *good[1:]])
    bad = finetune("--overwrite", "--set", "learning_rate=0", "--skip-bad", "2", *more, data=path)
    assert bad.exit_code == 0, bad.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == pytest.approx(without, abs=1e-6)


def test_data_of_bad_pictures_alone_are_refused(finetune: Callable[..., Result], tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path / "data", 2)
    for number in range(2):
        (tmp_path / "data" / f"{number}.png").write_bytes(b"this is no picture")
    refused(finetune("--skip-bad", "5", data=path), 1, "is bad")


def test_skip_bad_counts_broken_lines_and_broken_pictures_together(
    finetune: Callable[..., Result], tmp_path: Path
) -> None:
    path = draw_jsonl(tmp_path / "data")
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    (tmp_path / "data" / "2.png").write_bytes(b"this is no picture")
    refused(finetune("--skip-bad", "1", data=path), 1, "2.png", "More than 1 samples are bad (--skip-bad 1)")
    refused(finetune("--eval-data", path, "--skip-bad", "1"), 1, "2.png", "More than 1 samples are bad")
    kept = finetune("--eval-data", path, "--skip-bad", "2", data=path)
    assert kept.exit_code == 0, kept.output
    assert kept.output.count("broken JSON") == 2, "a note is not shown once a data set"


def test_undecodable_picture_of_the_evaluation_data_is_named(finetune: Callable[..., Result], tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path / "data")
    (tmp_path / "data" / "2.png").write_bytes(b"this is no picture")
    refused(finetune("--eval-data", path), 1, "annotations.jsonl, line 3", "2.png")
    assert not (tmp_path / "run").exists()
    skipping = finetune("--eval-data", path, "--skip-bad", "1")
    assert skipping.exit_code == 0, skipping.output


def test_output_that_exists_is_kept(finetune: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    refused(finetune(), 1, "exists", "--overwrite")
    refused(finetune("--overwrite"), 1, "was not written by weightport", "thesis.txt")
    refused(finetune("--resume"), 1, "is not a run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file_is_kept(finetune: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    refused(finetune(), 1, "run is no folder, and the output is one")
    refused(finetune("--overwrite"), 1, "run is no folder, and the output is one")
    assert (tmp_path / "run").read_text() == "a file"


def test_run_is_replaced_when_asked(finetune: Callable[..., Result], tmp_path: Path) -> None:
    assert finetune().exit_code == 0
    refused(finetune(), 1, "--resume", "--overwrite")
    done = finetune("--overwrite", "--set", "max_steps=1")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "model" / "training.json").read_text())["steps"] == 1


def test_too_little_disk_is_noticed_before_the_first_step(
    finetune: Callable[..., Result],
    tiny: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tiny("florence2")  # converted before the disk seems full
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(finetune(), 1, "1.0 kB free", "--output")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_no_number_stops_the_run_and_names_the_batch(
    finetune: Callable[..., Result], tmp_path: Path
) -> None:
    done = finetune("--set", "learning_rate=1e30", "--set", "max_grad_norm=0")
    refused(done, 1, "The loss is", "at step", "annotations.jsonl, line ", "learning rate", "there is no checkpoint")
    assert "--resume" not in done.output
    assert not (tmp_path / "run" / "model").exists()


def test_weight_that_is_no_number_is_noticed_in_the_first_step(
    finetune: Callable[..., Result], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny("florence2"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("decoder.layers.0.fc1.weight"))
    tensors[name].fill_(torch.nan)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(finetune(model=tmp_path / "model"), 1, "The loss is nan at step 1", "line ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("saved", [0, 1])
def test_disk_that_fills_up_is_named_and_whole_checkpoints_stay(
    error: Exception, saved: int, finetune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, calls = Trainer._save_optimizer_and_scheduler, []

    def full(trainer: Trainer, folder: str) -> None:
        calls.append(folder)
        if len(calls) > saved:
            raise error
        save(trainer, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    done = finetune("--set", "save_strategy=steps", "--set", "save_steps=1", "--set", "max_steps=3")
    refused(done, 1, "is full", "--resume" if saved else "Nothing was left behind")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1").exists() == bool(saved)


def test_metric_that_the_data_cannot_have_is_refused_before_training(
    finetune: Callable[..., Result], pairs: Path, tmp_path: Path
) -> None:
    done = finetune("--eval-data", pairs, "--set", "evaluation.metrics=[ap]")
    refused(done, 1, "gives no boxes")
    assert not (tmp_path / "run").exists()


def test_best_model_without_evaluation_data_is_said_to_be_impossible(finetune: Callable[..., Result]) -> None:
    done = finetune("--set", "load_best_model_at_end=true", "--set", "eval_strategy=epoch")
    assert done.exit_code == 0, done.output
    assert "load_best_model_at_end is off" in " ".join(done.output.split())


def test_warm_up_longer_than_the_run_is_noted(finetune: Callable[..., Result]) -> None:
    done = finetune("--set", "warmup_steps=3000")
    assert done.exit_code == 0, done.output
    assert "3 of 3,000 warm-up steps" in done.output
    assert "warm-up" not in finetune("--set", "warmup_steps=2", "--overwrite").output


def test_loss_that_is_no_number_offers_the_checkpoint_that_there_is(
    finetune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = Trainer.training_step

    def broken(trainer: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(trainer, *args, **kwargs)
        return loss * torch.nan if trainer.state.global_step == 2 else loss

    monkeypatch.setattr(Trainer, "training_step", broken)
    done = finetune("--set", "save_strategy=steps", "--set", "save_steps=1")
    refused(done, 1, "The loss is nan at step 3", "checkpoint-2 is whole (--resume)")


def test_header_says_what_the_run_will_do(finetune: Callable[..., Result], pairs: Path) -> None:
    short = finetune("--eval-data", pairs, "--set", "evaluation.samples=2")
    assert "steps    3 · learning rate" in short.output and "epoch" not in short.output.split("train ")[0]
    assert "measured on 2 of 4" in short.output
    steps = [each for each in FEW if not each.startswith("max_steps")]
    whole = finetune("--overwrite", "--set", "num_train_epochs=2", steps=steps)
    assert "steps    4 in 2 epochs · learning rate" in whole.output
    assert "batch    2 samples a step · 1 process on cpu" in whole.output
    assert "nothing is measured (--eval-data, --eval-fraction)" in whole.output
