"""What a terminal shows of a run: figures that are true, one line at a time, and a cursor that comes back."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from torch.utils.data import Dataset, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from weightport.finetuning.data.samples import Objects
from weightport.finetuning.display import pace, progress
from weightport.finetuning.display.pace import Clock, Pace
from weightport.finetuning.display.previews import described, preview_lines, show_previews, spread
from weightport.finetuning.display.progress import ProgressLine
from weightport.finetuning.evaluation.predictions import Prediction

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Ten(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), float(index)), "labels": torch.tensor(float(index))}


class Stream(IterableDataset):
    def __iter__(self):
        return (Ten()[index] for index in range(10))


class Line(torch.nn.Module):
    """Fails, as a user's interrupt or a bad batch would, at the forward pass `fails_at`."""

    def __init__(self, fails_at: int = 0, failure: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.calls, self.fails_at, self.failure = 0, fails_at, failure

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.failure("as planned")
        found = self.layer(x).squeeze(-1)
        return {"loss": ((found - labels) ** 2).mean(), "logits": found}


class Ticking:
    """A clock that moves when a test says so, and at nothing else."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Working(TrainerCallback):
    """Makes steps, predictions and evaluations take known times."""

    def __init__(self, clock: Ticking, step: float = 2.0, prediction: float = 100.0) -> None:
        self.clock, self.step, self.prediction = clock, step, prediction

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.clock.now += self.step

    def on_prediction_step(self, args, state, control, **kwargs):
        self.clock.now += self.prediction


@pytest.fixture
def clock(monkeypatch) -> Ticking:
    ticking = Ticking()
    for module in (pace, progress):
        monkeypatch.setattr(module, "time", ticking)
    return ticking


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def trained(
    folder: Path,
    progress: ProgressLine,
    *others: TrainerCallback,
    model: torch.nn.Module | None = None,
    resume: str | None = None,
    data: Dataset | None = None,
    **changes,
) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
        **changes,
    }
    trainer = Trainer(
        model=model or Line(),
        args=TrainingArguments(**settings),
        train_dataset=data or Ten(),
        eval_dataset=Ten(),
        callbacks=[*others, progress],
    )
    trainer.remove_callback(PrinterCallback)
    with progress:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_lines_are_plain_where_there_is_no_terminal(tmp_path, clock):
    out = io.StringIO()
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock))
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert [line.split()[0] for line in lines] == ["train", *["evaluate"] * 6, "train"]
    assert re.search(
        r"step 4 of 4 · epoch 2\.00 of 2 · loss \S+ · lr \S+ · \S+ samples/s · took 0:06:48 · memory \S+ .B$",
        lines[-1],
    )


def test_the_first_step_is_shown_with_its_own_loss(tmp_path, clock):
    out = io.StringIO()
    trainer = trained(tmp_path, ProgressLine(6, stream=out), Working(clock))
    first = trainer.state.log_history[0]
    assert out.getvalue().startswith("train    step 1 of 4 · epoch 0.50 of 2")
    assert f"loss {float(first['loss']):.4g} · lr {first['learning_rate']:.2e}" in out.getvalue().splitlines()[0]


def test_lines_come_ten_seconds_apart_at_least(tmp_path, clock):
    out = io.StringIO()
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock), num_train_epochs=10, eval_strategy="no")
    steps = [int(step) for step in re.findall(r"step (\d+) of 20", out.getvalue())]
    # Two seconds a step: the first, each fifth after it, and the end.
    assert steps == [1, 6, 11, 16, 20]


def test_every_evaluation_gets_a_line_with_its_metrics(tmp_path, clock):
    out = io.StringIO()
    trainer = trained(tmp_path, ProgressLine(6, stream=out), Working(clock))
    losses = [f"{entry['eval_loss']:.4g}" for entry in trainer.state.log_history if "eval_loss" in entry]
    shown = re.findall(r"^evaluate step (\d) · loss (\S+) · took \S+$", out.getvalue(), re.MULTILINE)
    assert shown == [("2", losses[0]), ("4", losses[1])]
    assert "samples_per_second" not in out.getvalue()


def test_samples_a_second_count_training_time_and_the_short_last_batch(tmp_path, clock):
    out = io.StringIO()
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock))
    # Two epochs of ten samples in four steps of two seconds; evaluations took hundreds of seconds.
    assert "2.5 samples/s" in out.getvalue().splitlines()[-1]


def test_remaining_time_counts_evaluations(tmp_path, clock):
    out = io.StringIO()
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock, step=20), num_train_epochs=4)
    line = next(line for line in out.getvalue().splitlines() if "step 3 of 8" in line)
    # Three steps of 20 s and an evaluation of two batches of 100 s are done; five steps are left.
    assert "0:07:13 left" in line


def test_a_resumed_run_does_not_count_the_steps_it_skipped(tmp_path, clock):
    trained(tmp_path, ProgressLine(6, quiet=True), save_strategy="epoch")
    out = io.StringIO()
    resume = str(tmp_path / "checkpoint-2")
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock), save_strategy="epoch", resume=resume)
    assert out.getvalue().startswith("train    step 3 of 4")
    # Six samples in the first two seconds after resuming; steps 1 and 2 would make it 8.
    assert "3.0 samples/s" in out.getvalue().splitlines()[0]
    assert "2.5 samples/s" in out.getvalue().splitlines()[-1]


def test_a_stream_without_a_length_still_has_a_rate(tmp_path, clock):
    out = io.StringIO()
    data = Stream()
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock), data=data, max_steps=3, eval_strategy="no")
    assert "step 3 of 3" in out.getvalue().splitlines()[-1]
    assert "3.0 samples/s" in out.getvalue().splitlines()[-1]


def test_a_long_evaluation_says_how_far_it_is(tmp_path, clock):
    out = io.StringIO()
    trained(tmp_path, ProgressLine(6, stream=out), Working(clock), per_device_eval_batch_size=2)
    assert "evaluate batch 3 of 5 · 0:03:20 left" in out.getvalue()


class Answering(Trainer):
    """Generates after its prediction steps, ten seconds a sample, as an evaluation with metrics does."""

    clock: Ticking
    line: ProgressLine

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        advance = self.line.answering(10)
        for _ in range(5):
            self.clock.now += 20.0
            advance(2)
        return output


def test_generating_answers_says_how_far_it_is(tmp_path, clock):
    for out, quiet in ((io.StringIO(), False), (Terminal(), False), (io.StringIO(), True)):
        line = ProgressLine(6, quiet=quiet, stream=out)
        args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Answering(model=Line(), args=args, eval_dataset=Ten(), callbacks=[line])
        trainer.clock, trainer.line = clock, line
        trainer.remove_callback(PrinterCallback)
        with line:
            trainer.evaluate()
        if quiet:
            assert out.getvalue() == ""
        elif out.isatty():
            assert "sample 2 of 10 · 0.1 samples/s · 0:01:20 left" in out.getvalue()
        else:
            assert re.findall(r"^answer +(.*)", out.getvalue(), re.MULTILINE)[2:4] == [
                "sample 6 of 10 · 0.1 samples/s · 0:00:40 left",
                "sample 8 of 10 · 0.1 samples/s · 0:00:20 left",
            ]
    outside = io.StringIO()
    ProgressLine(6, stream=outside).answering(10)(1)
    assert outside.getvalue() == ""


def test_an_evaluation_without_training_has_its_line_too(tmp_path):
    for out in (io.StringIO(), Terminal()):
        progress = ProgressLine(6, stream=out)
        args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model=Line(), args=args, eval_dataset=Ten(), callbacks=[progress])
        trainer.remove_callback(PrinterCallback)
        with progress:
            trainer.evaluate()
        assert "evaluate loss " in out.getvalue()
        assert out.getvalue().count(HIDE) == out.getvalue().count(SHOW)


def test_quiet_and_other_processes_show_nothing(tmp_path, capsys):
    for out in (io.StringIO(), Terminal()):
        trained(tmp_path, ProgressLine(6, quiet=True, stream=out))
        assert out.getvalue() == ""
    out = io.StringIO()
    line = ProgressLine(6, stream=out)
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    elsewhere = TrainerState(is_world_process_zero=False, max_steps=4)
    line.on_train_begin(args, elsewhere, None)
    line.on_log(args, elsewhere, None, logs={"loss": 1.0})
    line.on_prediction_step(args, elsewhere, None, eval_dataloader=[1])
    line.on_evaluate(args, elsewhere, None, metrics={"eval_loss": 1.0})
    line.on_train_end(args, elsewhere, None)
    assert out.getvalue() == "" and capsys.readouterr().out == ""


def test_nothing_goes_to_the_screen_beside_the_given_stream(tmp_path, capsys):
    trained(tmp_path, ProgressLine(6, stream=io.StringIO()))
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_live_line_and_its_cursor_back(tmp_path):
    out = Terminal()
    trained(tmp_path, ProgressLine(6, stream=out))
    assert out.getvalue().count(HIDE) == out.getvalue().count(SHOW) == 1
    assert out.getvalue().rindex(SHOW) > out.getvalue().rindex("step 4 of 4")
    assert out.getvalue().count("evaluate step") == 2


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [3, 4])
def test_the_cursor_comes_back_when_training_or_evaluation_fails(tmp_path, failure, fails_at):
    # Forward passes 1 and 2 train, 3 and 4 evaluate with batches of 5 and train without evaluation.
    out = Terminal()
    with pytest.raises(failure, match="as planned"):
        trained(
            tmp_path,
            ProgressLine(6, stream=out),
            model=Line(fails_at, failure),
            per_device_eval_batch_size=5,
            eval_strategy="epoch" if fails_at == 4 else "no",
        )
    assert out.getvalue().count(HIDE) == out.getvalue().count(SHOW) == 1
    assert out.getvalue().rindex(SHOW) > out.getvalue().rindex(HIDE)


def test_a_narrow_terminal_drops_the_bar_before_any_figure(tmp_path, monkeypatch):
    shown = {}
    for columns in (70, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = Terminal()
        trained(tmp_path, ProgressLine(6, stream=out))
        shown[columns] = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "━" in shown[200] and "━" not in shown[70]
    for said in ("step 4 of 4", "loss", "samples/s", "took 0:00:0", "memory"):
        assert said in shown[70]


def test_a_loss_that_is_no_number_is_shown_as_such(tmp_path):
    out = io.StringIO()
    model = Line()
    torch.nn.init.constant_(model.layer.weight, float("nan"))
    trained(tmp_path, ProgressLine(6, stream=out), model=model, logging_nan_inf_filter=False, eval_strategy="no")
    assert "loss nan" in out.getvalue()


def test_pace_counts_what_a_data_set_holds():
    loader = torch.utils.data.DataLoader(Ten(), batch_size=3)
    pace = Pace.of(6, 2, loader)
    # Four batches, two a step: 6 and 4 samples.
    assert [pace.samples(step) for step in range(5)] == [0, 6, 10, 16, 20]
    dropping = Pace.of(3, 1, torch.utils.data.DataLoader(Ten(), batch_size=3, drop_last=True))
    assert [dropping.samples(step) for step in (3, 4, 6)] == [9, 12, 18]
    assert Pace.of(6, 1, None).samples(3) == 18


def test_clock_leaves_out_what_came_before_the_first_step(clock):
    counted = Clock()
    clock.now += 50
    counted.returned()
    counted.begin()
    clock.now += 2
    counted.worked()
    clock.now += 30
    counted.returned()
    counted.begin()
    clock.now += 4
    counted.worked()
    assert counted.training == 6 and counted.elapsed == 36


# Previews


def prediction(index: int, text: str = "a", *references: str, prompt: str = "q", **changes) -> Prediction:
    return Prediction(index, f"val.jsonl, line {index + 1}", f"{index}.png", prompt, text, references, **changes)


def test_previews_are_the_same_samples_each_time_whatever_their_order():
    predictions = [prediction(index) for index in range(100)]
    assert [each.index for each in spread(predictions, 4)] == [0, 25, 50, 75]
    assert spread(predictions[::-1] + predictions[:8], 4) == spread(predictions, 4)
    assert [each.index for each in spread(predictions[:2], 4)] == [0, 1]
    assert spread([], 4) == [] and spread(predictions, 0) == [] and spread(predictions, -1) == []


def test_a_preview_tells_what_the_model_said_from_the_reference():
    lines = preview_lines([prediction(0, "12 March", "March 12", "3/12", prompt="When?")], 3, width=80)
    assert lines == [
        "sample 0 · val.jsonl, line 1",
        "  asked      When?",
        "  model      12 March",
        "  reference  March 12 (or 1 other)",
    ]
    assert preview_lines([prediction(0, "yes ", "no", "yes")], 1, width=80)[2] == "  model ✓    yes"
    assert preview_lines([prediction(0, "", "no")], 1, width=80)[2] == "  model      (nothing)"


@pytest.mark.parametrize("width", [29, 40, 80])
@pytest.mark.parametrize("text", ["一只红色的球在绿色的草地上" * 9, "word " * 60, "x" * 500, "a一" * 70])
def test_no_preview_line_is_wider_than_the_terminal(width, text):
    lines = preview_lines([prediction(0, text, text, prompt=text)], 1, width=width)
    assert all(cell_len(line) <= width for line in lines)
    assert max(cell_len(line) for line in lines) >= width - 6, "the room is used"
    assert len(lines) == 1 + 1 + 3 + 3 and all(lines[i].endswith("…") for i in (1, 4, 7))


def test_a_text_that_fits_is_shown_whole():
    text = "一只红色的球在绿色的草地上"
    lines = preview_lines([prediction(0, text, text)], 1, width=29)
    assert "".join(line[13:] for line in lines[2:4]) == text
    assert not any("…" in line for line in lines[1:])


def test_neither_data_nor_model_can_steer_the_terminal():
    lines = preview_lines([prediction(0, "\x1b[2J\x07a\n\tb\u202e", "r\rq", prompt="\x9b31m\u3000x")], 1, width=80)
    assert all(line.isprintable() for line in lines)
    assert "a b" in lines[2]


def test_a_detection_is_previewed_by_its_boxes():
    boxes = Objects(("dog", "cat", "dog"), ((0, 0, 1, 1),) * 3, (2, 2))
    assert described(boxes) == "3 boxes: 2 dog, 1 cat"
    assert described(Objects((), (), (2, 2))) == "0 boxes"
    lines = preview_lines([prediction(0, "dog<loc_1>", found=Objects((), (), (2, 2)), expected=boxes)], 1, width=80)
    assert lines[2:] == ["  model      0 boxes", "  reference  3 boxes: 2 dog, 1 cat"]


def test_previews_are_written_line_by_line():
    written: list[str] = []
    show_previews([prediction(0), prediction(1)], 2, write=written.append)
    assert len(written) == 8 and not any(os.linesep in line for line in written)
