"""transformers' Trainer with what every run here needs: the loss a guide asks for, answers at each evaluation, and an
end when a loss is no number."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from weightport.errors import DataError, TrainingError
from weightport.finetuning.augmentation import Epoch
from weightport.finetuning.data.collation import (
    FAILURE,
    FEATURE_LENGTHS,
    FEATURE_ROWS,
    FEATURES,
    INDICES,
    STAND_IN,
    Collator,
)
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.features.plan import FeaturePlan
from weightport.finetuning.setup.training_arguments import shares_weights_out
from weightport.finetuning.training.averaging import AveragedWeights
from weightport.finetuning.training.resuming import checkpoint_step, last_checkpoint
from weightport.finetuning.training.schedules import ProgressCosine
from weightport.finetuning.training.sharding import (
    is_fsdp2,
    loading_incomplete_states,
    prepare_sharding,
    shard_without_gpu,
    without_tied,
)

IGNORED = -100
"""The label that no loss counts."""


class PortTrainer(Trainer):
    """Trainer on batches of `Collator`, `eval_collator` being that of the evaluation data.

    `measure` answers the evaluation data with the model at a step and returns metrics by name; in every process, at
    every evaluation. `samples` are the training data, to name those of a batch that fails. `features`: of what plan
    batches hold features in the place of pictures. `by_sample`: the loss is a mean over samples, not over tokens.
    `undivided`: a step's loss is the sum of its batches' own means. `schedule`: of the learning rate, in place of the
    arguments'.
    `epoch` is told the number of each epoch that begins. `sampler`: the order of training samples, by default a random
    one. `averaged`: what is measured and saved in the place of the weights themselves.
    """

    def __init__(
        self,
        *args: Any,
        samples: Samples,
        eval_collator: Collator | None = None,
        measure: Callable[[Any, int], Mapping[str, float]] | None = None,
        features: FeaturePlan | None = None,
        by_sample: bool = False,
        undivided: bool = False,
        schedule: ProgressCosine | None = None,
        epoch: Epoch | None = None,
        sampler: Sampler[int] | None = None,
        averaged: AveragedWeights | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Checkpoints within a second of each other, as small runs write them, are sorted by number: no cause to warn.
        logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
        self._eval_collator = eval_collator
        self._samples = samples
        self._measure = measure
        self._features = features
        self._by_sample = by_sample
        self._undivided = undivided
        if undivided:
            # What Trainer would divide a batch's mean by otherwise: the batches of a step.
            self.loss_is_scaled_for_ga = True
        self._schedule = schedule
        self._epoch = epoch or Epoch()
        self._sampler = sampler
        self._averaged = averaged
        self._evaluated = -1
        self._best_loaded: int | None = None
        self._in_checkpoint = False

    @property
    def held_step(self) -> int:
        """The step that the model's weights are of: the last one, or that of the best model which was loaded."""
        return self.state.global_step if self._best_loaded is None else self._best_loaded

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None and self._schedule is not None:
            rates = self._schedule.over(num_training_steps, self.args.warmup_steps or 0)
            stepped: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(stepped, rates)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        # A resumed run may have come to its end before.
        if not self.control.should_training_stop:
            self._epoch.begin(epoch)
            super()._run_epoch(model, epoch, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self._sampler if self._sampler is not None else super()._get_train_sampler(train_dataset)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Only the evaluation before the first step leaves the schedule alone. A run with it has the losses of one
        # without.
        with _same_random_state() if skip_scheduler else nullcontext():
            measured: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        return measured

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.device.type == "cpu" and shares_weights_out(self.args) == "FSDP":
            shard_without_gpu()
        super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if is_fsdp2(self.accelerator):
            prepare_sharding(self.model, self.accelerator)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._averaged is not None:
            self._averaged.begin(self.model)
            if resume_from_checkpoint is not None:
                self._averaged.load(Path(resume_from_checkpoint))
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        unused = is_fsdp2(self.accelerator) and self.args.ddp_find_unused_parameters
        with loading_incomplete_states() if unused else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._averaged is not None and self.args.should_save:
            self._averaged.save(Path(output_dir))

    def adopt_average(self) -> None:
        """Give the model the average of its weights for good, where there is one."""
        if self._averaged is not None:
            self._averaged.adopt()
            self._averaged = None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._averaged is not None:
            self._averaged.load(Path(self.state.best_model_checkpoint or ""))
        # best_global_step may name a step that no checkpoint was saved at.
        self._best_loaded = checkpoint_step(Path(self.state.best_model_checkpoint or ""))

    def end_without_checkpoint(self) -> None:
        """Take the place of the end of a training whose last checkpoint could not be written, as far as the result
        depends on it: the best model is loaded, and what there is of the checkpoint removed."""
        self.is_in_train = False
        partial = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(partial, ignore_errors=True)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        # Trainer counts the labels of all batches of a step before it takes the first: one that could not be made has
        # none.
        for batch in batch_samples:
            _require_made(batch)
        if self._undivided:
            return None
        if self._by_sample:
            # Counted as Trainer counts labels: one of a sample, that is not the first of its row.
            batch_samples = [{"labels": _sample_marks(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        collator = self.data_collator
        self.data_collator = self._eval_collator or collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        placed: dict[str, Any] = super()._prepare_inputs(inputs)
        if self._features is None or FEATURES not in placed:
            return placed
        states, lengths, rows = (placed.pop(name, None) for name in (FEATURES, FEATURE_LENGTHS, FEATURE_ROWS))
        return self._features.feed(placed, states, lengths, rows)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A checkpoint holds a tied matrix once: the names that share it are not missing.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        known = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        if lost := [name for name in load_result.missing_keys if name not in known]:
            # Trainer would go on from the base's weights there.
            raise TrainingError(
                f"The checkpoint lacks {len(lost)} of the model's tensors, such as {lost[0]}: it was written by "
                "another version, or for another model. Begin the run again."
            )
        super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:
            state_dict = without_tied(state_dict, self.model)
        if not self._in_checkpoint or not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        # Trainer reads a checkpoint by the names in memory, and passes over what is called otherwise, as files are
        # whose names on disk differ.
        model: Any = self.model
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        indices = _indices(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Trainer's own filter of NaN waits for the loss too; it would hide it.
        if not torch.isfinite(loss):
            places = "\n      ".join(self._samples[index].place for index in indices)
            found = last_checkpoint(Path(self.args.output_dir or "").parent)
            left = f"{found.name} is whole (--resume)" if found else "there is no checkpoint yet to resume from"
            raise TrainingError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. The batch was\n      {places}\n"
                "  A smaller learning rate, bfloat16 instead of float16, or max_grad_norm=1.0 often helps; "
                f"{left}."
            )
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        stands_in = STAND_IN in inputs
        indices = _indices(inputs)
        if stands_in and self.args.world_size == 1:
            # Its samples were bad: another one's loss is not theirs. Processes must go on in step, and count it.
            return None, None, None
        # Several processes get batches of one size, the last ones filled with samples from the beginning: these have
        # been counted. A batch of nothing else is left as it is: Trainer drops its loss.
        highest = list(accumulate((self._evaluated, *indices), max))
        new = torch.tensor([after > before for before, after in pairwise(highest)])
        self._evaluated = highest[-1]
        if new.any() and not new.all():
            labels = inputs["labels"]
            inputs["labels"] = labels.masked_fill(~new.to(labels.device)[:, None], IGNORED)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated = -1
        shared = self.args.average_tokens_across_devices
        # A step's loss is divided by the tokens of all processes; here some of these tokens are not counted.
        self.args.average_tokens_across_devices = False
        with self._averaged.in_place() if self._averaged is not None else nullcontext():
            try:
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            finally:
                self.args.average_tokens_across_devices = shared
            if self._measure is not None and output.metrics is not None:
                found = self._measure(self.accelerator.unwrap_model(self.model), self.state.global_step)
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output


class LogBeforeSaving(TrainerCallback):
    """Writes the mean loss so far into the log wherever a checkpoint is saved: a resumed run then logs the same means
    as one that was never interrupted."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control


class Averaging(TrainerCallback):
    """Lets an average of the weights take in every step."""

    def __init__(self, averaged: AveragedWeights) -> None:
        self._averaged = averaged

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._averaged.update(state.global_step)


class FirstCheckpoint(TrainerCallback):
    """Calls `reached` when a checkpoint stands on the disk: from then on the run can be resumed."""

    def __init__(self, reached: Callable[[], None]) -> None:
        self._reached = reached

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._reached()
        return control


class BestCheckpointOfThisRun(TrainerCallback):
    """Takes the best checkpoint of a resumed run from its own folder: its state names the path that it had then, and
    Trainer would save the last model in its place when the run was moved."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        known = state.best_model_checkpoint
        step = state.best_global_step if known is None else checkpoint_step(Path(known))
        here = Path(args.output_dir or "") / f"checkpoint-{step}"
        if step is not None and here.is_dir():
            state.best_model_checkpoint = str(here)


def loss_with_padding(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Plain cross entropy over every label but -100, whatever token it is: a guide's loss that counts padding.

    logits [batch, length, vocabulary], labels int64 [batch, length]; computed in float32, or in float64 if they are.
    """
    logits = outputs.logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    labels = labels.to(logits.device).flatten()
    if num_items_in_batch is None:
        return torch.nn.functional.cross_entropy(logits, labels)
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def loss_of_samples(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, *, shift: bool
) -> torch.Tensor:
    """The mean over samples of each one's mean over its labels but -100, by `num_items_in_batch` samples.

    logits [batch, columns, vocabulary], labels int64 [batch, length]; computed in float32, or in float64 if they are.
    `shift`: the logits of a column are for the label of the next one. Columns of an image before the text have no
    labels.
    """
    logits = outputs.logits[:, -labels.shape[1] :]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    labels = labels.to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    counted = (labels != IGNORED).sum(dim=1)
    total = (losses.sum(dim=1) / counted.clamp(min=1)).sum()
    items = (counted > 0).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Random numbers behind the block are those that would come without it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _sample_marks(labels: torch.Tensor) -> torch.Tensor:
    """int64 [batch, 2]: 1 in the second column for a sample that has labels, -100 elsewhere."""
    marks = torch.full((len(labels), 2), IGNORED)
    marks[(labels != IGNORED).any(dim=1).cpu(), 1] = 1
    return marks


def _indices(inputs: dict[str, Any]) -> list[int]:
    """Take what is not the model's out of a batch. Raises DataError when the batch could not be made."""
    _require_made(inputs)
    inputs.pop(STAND_IN, None)
    return inputs.pop(INDICES).tolist()


def _require_made(inputs: Mapping[str, Any]) -> None:
    if FAILURE in inputs:
        raise DataError(inputs[FAILURE])
