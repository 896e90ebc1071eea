"""One run: a converted model, data and a recipe to a fine-tuned model or adapter, its metrics and its report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback

from .. import __version__
from ..errors import OutputError
from .answering import World, answers, chosen, write_predictions
from .collation import BadSamples, Collator, Indexed
from .metrics import score_all
from .predictions import Prediction
from .preparing import Job, Prepared, prepare
from .previews import preview_lines
from .progress import ProgressLine
from .recipe import as_yaml
from .results import Outcome, finish
from .resuming import RECIPE, last_checkpoint
from .samples import Samples
from .settings import Recipe
from .trainer import LogBeforeSaving, PortTrainer, loss_with_padding

PREDICTIONS = "predictions"


@dataclass
class _Measured:
    """Answers of the last evaluation; Trainer calls the measuring, the report wants what it saw."""

    predictions: list[Prediction] = field(default_factory=list)


def finetune(
    job: Job,
    *,
    announce: Callable[[Prepared], None] = lambda prepared: None,
    say: Callable[[str], None] = lambda line: None,
    quiet: bool = False,
) -> Outcome:
    """Run `job` in this process, or as one of the processes that `accelerate launch` or `torchrun` started.

    `announce` is called before the first step, `say` with lines to show. Raises a WeightportError before anything is
    written when the model, the data or a setting cannot be right, and TrainingError when a loss is no number.
    """
    prepared = prepare(job)
    main = prepared.arguments.process_index == 0
    # Every process has looked at the output before one makes it.
    PartialState().wait_for_everyone()
    if main:
        announce(prepared)
        _begin(job)
    PartialState().wait_for_everyone()
    try:
        return _train(job, prepared, say=say if main else _silent, quiet=quiet or not main)
    except BaseException:
        # A run that has nothing to resume from leaves nothing behind.
        if main and not job.resume and last_checkpoint(job.output) is None:
            shutil.rmtree(job.output, ignore_errors=True)
        raise


def _begin(job: Job) -> None:
    """Make the run's folder, with the recipe that gives the run again."""
    if job.resume:
        return
    if job.output.exists():
        shutil.rmtree(job.output)
    try:
        job.output.mkdir(parents=True)
        comments = [f"Fine-tuned by weightport {__version__}. The same run again:"]
        comments.append(f"{job.command}  (--recipe with this file in place of the settings)")
        (job.output / RECIPE).write_text(as_yaml(job.recipe, comments), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{job.output} cannot be written: {error}.") from error


def _train(job: Job, prepared: Prepared, *, say: Callable[[str], None], quiet: bool) -> Outcome:
    recipe, loaded, arguments = job.recipe, prepared.loaded, prepared.arguments
    family, measured = loaded.family, _Measured()
    bad = BadSamples(len(prepared.samples), recipe.data.skip_bad)

    def collator(counted: BadSamples) -> Collator:
        return Collator(family, loaded.processor, loaded.model.config, recipe.batch, counted)

    def measure(model: Any) -> Mapping[str, float]:
        return _measure(job, prepared, trainer, measured, model, say)

    eval_samples = prepared.eval_samples
    trainer = PortTrainer(
        loaded.model,
        arguments,
        data_collator=collator(bad),
        train_dataset=Indexed(prepared.samples),
        eval_dataset=_subset(eval_samples, recipe) if eval_samples is not None else None,
        compute_loss_func=loss_with_padding if recipe.batch.count_padding and family.own_loss else None,
        samples=prepared.samples,
        eval_collator=collator(BadSamples(len(eval_samples), recipe.data.skip_bad)) if eval_samples else None,
        measure=measure if eval_samples is not None and recipe.evaluation.metrics else None,
    )
    trainer.remove_callback(PrinterCallback)
    samples_per_step = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    trainer.add_callback(LogBeforeSaving())
    with ProgressLine(samples_per_step, quiet=quiet) as progress:
        trainer.add_callback(progress)
        trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
        if eval_samples is not None and not _evaluated(trainer):
            trainer.evaluate()
    notes = list(prepared.notes)
    if bad.count:
        notes.append(f"{bad.count} samples were left out while training, because they could not be read")
    return finish(job, prepared, trainer, measured.predictions, notes)


def _evaluated(trainer: PortTrainer) -> bool:
    """Whether the last step was evaluated."""
    state = trainer.state
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


def _measure(
    job: Job, prepared: Prepared, trainer: PortTrainer, measured: _Measured, model: Any, say: Callable[[str], None]
) -> Mapping[str, float]:
    """Answers to the evaluation data, written and scored; the same figures in every process."""
    recipe, loaded, samples = job.recipe, prepared.loaded, prepared.eval_samples
    if samples is None:
        return {}
    arguments = prepared.arguments
    measured.predictions = answers(
        model,
        loaded.processor,
        loaded.family,
        samples,
        chosen(len(samples), recipe.evaluation.samples),
        recipe.batch,
        recipe.evaluation,
        skip_bad=recipe.data.skip_bad,
        workers=arguments.dataloader_num_workers,
        autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
        world=World(arguments.process_index, arguments.world_size),
    )
    if trainer.is_world_process_zero():
        write_predictions(
            job.output / PREDICTIONS / f"step-{trainer.state.global_step:06}.jsonl", measured.predictions
        )
    for line in preview_lines(measured.predictions, recipe.evaluation.previews):
        say(line)
    return score_all(recipe.evaluation.metrics, measured.predictions)


def _subset(samples: Samples, recipe: Recipe) -> Any:
    return torch.utils.data.Subset(Indexed(samples), chosen(len(samples), recipe.evaluation.samples))


def _silent(line: str) -> None:
    return None
