"""What a terminal shows while a run goes on: one live line with its figures, plain lines now and then elsewhere."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightport.finetuning.display.pace import Clock, Pace
from weightport.finetuning.metrics import headline
from weightport.formatting import size

PLAIN_INTERVAL = 10.0
"""Seconds between lines at least, when the output is not a terminal."""

BAR_FROM = 140
"""Cells of a terminal that has room for a bar beside the figures."""

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
"""What Trainer logs about an evaluation's speed, under its prefix: no metrics."""


@dataclass
class Session:
    """A call of train(): where it began, and what was logged last."""

    first_step: int
    pace: Pace
    clock: Clock = field(default_factory=Clock)
    loss: float | None = None
    learning_rate: float | None = None

    def samples(self, step: int) -> int:
        """Samples processed in this session up to the end of `step`."""
        return self.pace.samples(step) - self.pace.samples(self.first_step)


@dataclass
class Evaluation:
    """An evaluation under way: when its first batch ended, and how many have."""

    first_ended: float
    batches: int = 0


class ProgressLine(TrainerCallback):
    """Loss, learning rate, samples a second, remaining time, memory and epoch of a run, in place of Trainer's bars.

    Give Trainer `disable_tqdm=True`, remove its PrinterCallback, and train inside a `with` block: the live line ends
    and the cursor returns however the block ends, by Ctrl-C too.

        with ProgressLine(samples_per_step) as progress:
            trainer = Trainer(…, callbacks=[progress])
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    `samples_per_step`: batch of one process × processes × accumulation. Samples a second are those of this session
    over its training time; the remaining time counts evaluations and checkpoints as often as they came so far. Memory
    is the peak of torch's allocations on CUDA, the process's resident set elsewhere. Only the world's process zero
    shows anything; `quiet` shows nothing at all. `stream` is standard output unless given.
    """

    def __init__(self, samples_per_step: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._samples_per_step = samples_per_step
        self._quiet = quiet
        self._stream = stream
        self._live: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._session: Session | None = None
        self._evaluation: Evaluation | None = None
        self._shown = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the live line and give the cursor back. Again is harmless."""
        atexit.unregister(self.close)
        live, self._live, self._bars = self._live, None, {}
        self._session = self._evaluation = None
        if live is not None:
            live.stop()

    # Training. There is a session only where something is shown.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        # A second beginning without an end: Trainer found that a batch did not fit and halved it.
        self.close()
        if self._silent(state):
            return
        pace = Pace.of(self._samples_per_step, args.gradient_accumulation_steps, train_dataloader)
        self._session = Session(state.global_step, pace)
        self._shown = -math.inf
        if self._on_terminal:
            self._show(self._session, args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:
            self._session.clock.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is None:
            return
        self._session.clock.worked()
        # Where Trainer logs this step, the line waits for its loss.
        if not control.should_log:
            self._show(self._session, args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:
            self._session.clock.worked()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._session is not None:
            self._session.clock.returned()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._session is None or logs is None or "loss" not in logs:
            return
        self._session.loss, self._session.learning_rate = logs["loss"], logs.get("learning_rate")
        self._show(self._session, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is None:
            return
        # The last figures, however recent the line before.
        self._shown = -math.inf
        self._show(self._session, args, state)
        self.close()

    # Evaluation, during training or by itself

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._silent(state):
            return
        now = time.monotonic()
        if self._evaluation is None:
            self._evaluation = Evaluation(first_ended=now)
        self._evaluation.batches += 1
        try:
            total: int | None = len(eval_dataloader)
        except TypeError:
            total = None
        # The first batch ends when the clock begins: the rate is that of the batches after it.
        done, passed = self._evaluation.batches, now - self._evaluation.first_ended
        left = (total - done) * passed / (done - 1) if total and 1 < done < total else None
        figures = " · ".join(filter(None, (f"batch {_of(done, total)}", _left(left))))
        self._tell("evaluate", figures, done, total)

    def answering(self, total: int) -> Callable[[int], None]:
        """`advance(samples)` for what an evaluation generates after its prediction steps: `total` by this process.

        It shows nothing outside an evaluation, and where nothing else is shown.
        """
        if self._evaluation is None:
            return lambda count: None
        done, begun = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done
            done += count
            passed = time.monotonic() - begun
            rate = f"{done / passed:.1f} samples/s" if done and passed else ""
            left = _left((total - done) * passed / done) if 0 < done < total else ""
            self._tell("answer", " · ".join(filter(None, (f"sample {_of(done, total)}", rate, left))), done, total)

        return advance

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._session is not None:
            self._session.clock.returned()
        self._evaluated(state, metrics or {})

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._evaluated(state, metrics or {})

    def _evaluated(self, state: TrainerState, metrics: Mapping[str, Any]) -> None:
        if self._silent(state):
            return
        self._evaluation = None
        for label in ("evaluate", "answer"):
            if self._live is not None and label in self._bars:
                self._live.remove_task(self._bars.pop(label))
        if self._session is None:
            self.close()
        shown = {name.removeprefix("eval_").removeprefix("test_"): value for name, value in metrics.items()}
        seconds = shown.get("runtime")
        at = [f"step {state.global_step:,}"] if self._session is not None else []
        figures = [
            f"{name} {_figure(value)}"
            for name, value in headline(shown).items()
            if not name.endswith(TIMINGS) and name != "epoch" and isinstance(value, (int, float))
        ]
        took = [f"took {_time(seconds)}"] if isinstance(seconds, (int, float)) else []
        self._shown = time.monotonic()
        self._say("evaluate " + " · ".join([*at, *figures, *took]))

    # What is shown, and where

    def _silent(self, state: TrainerState) -> bool:
        return self._quiet or not state.is_world_process_zero

    @cached_property
    def _console(self) -> Console:
        return Console(file=self._stream or sys.stdout)

    @property
    def _on_terminal(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _show(self, session: Session, args: TrainingArguments, state: TrainerState) -> None:
        self._tell("train", _figures(session, args, state), state.global_step, state.max_steps)

    def _tell(self, label: str, figures: str, done: int, total: int | None) -> None:
        """The live line, or a plain one when it is due."""
        now = time.monotonic()
        if self._on_terminal:
            self._bar(label, figures, done, total)
        elif now - self._shown >= PLAIN_INTERVAL:
            self._shown = now
            self._say(f"{label:<8} {figures}")

    def _bar(self, label: str, figures: str, done: int, total: int | None) -> None:
        live = self._started()
        if label not in self._bars:
            self._bars[label] = live.add_task(label, total=total, completed=done, figures=figures)
        else:
            live.update(self._bars[label], completed=done, total=total, figures=figures)

    def _started(self) -> Progress:
        if self._live is None:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}", markup=False, table_column=Column(min_width=8))
            ]
            if self._console.width >= BAR_FROM:
                columns.append(BarColumn(bar_width=16))
            # On a narrow terminal the figures take a second line: all of them are wanted.
            folding = Column(no_wrap=False, overflow="fold")
            columns.append(TextColumn("{task.fields[figures]}", markup=False, table_column=folding))
            self._live = Progress(*columns, console=self._console)
            # Whoever forgets the `with` block still gets the cursor back when the process ends.
            atexit.register(self.close)
            self._live.start()
        return self._live

    def _say(self, line: str) -> None:
        if self._on_terminal:
            self._console.print(Text(line))
        else:
            print(line, file=self._console.file, flush=True)


def _figures(session: Session, args: TrainingArguments, state: TrainerState) -> str:
    steps, clock = state.global_step - session.first_step, session.clock
    remaining, samples = state.max_steps - state.global_step, session.samples(state.global_step)
    left = remaining * clock.elapsed / steps if steps else None
    figures = (
        f"step {_of(state.global_step, state.max_steps)}",
        f"epoch {state.epoch or 0:.2f} of {state.num_train_epochs}",
        f"loss {_figure(session.loss)}" if session.loss is not None else "",
        f"lr {session.learning_rate:.2e}" if session.learning_rate is not None else "",
        f"{samples / clock.training:.1f} samples/s" if samples and clock.training else "",
        _left(left) if remaining > 0 else f"took {_time(clock.elapsed)}",
        _memory(args.device),
    )
    return " · ".join(filter(None, figures))


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"GPU peak {size(torch.cuda.max_memory_allocated(device))}"
    # accelerate, which Trainer needs, brings it.
    import psutil

    return f"memory {size(psutil.Process().memory_info().rss)}"


def _of(done: int, total: int | None) -> str:
    return f"{done:,} of {total:,}" if total else f"{done:,}"


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _left(seconds: float | None) -> str:
    return f"{_time(seconds)} left" if seconds is not None and math.isfinite(seconds) else ""
