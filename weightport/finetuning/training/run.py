"""One run: a converted model, data and a recipe to a fine-tuned model or adapter, its metrics and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainingArguments

from weightport.errors import OutputError
from weightport.finetuning.augmentation import Augmentation, Epoch
from weightport.finetuning.data.collation import BadSamples, Collator, FullAnswers, Indexed, StoredFeatures
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.display.progress import ProgressLine
from weightport.finetuning.evaluation.answering import chosen
from weightport.finetuning.evaluation.measuring import Measuring
from weightport.finetuning.family import Family
from weightport.finetuning.features.filling import filled_store
from weightport.finetuning.recipes.recipe import as_yaml
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.rescue import disk_fault, is_full_disk
from weightport.finetuning.setup.batch_size import division_of
from weightport.finetuning.setup.preparing import Job, Prepared, prepare
from weightport.finetuning.training.averaging import AveragedWeights
from weightport.finetuning.training.early_stopping import EarlyStopping
from weightport.finetuning.training.results import RESULTS, Outcome, finish
from weightport.finetuning.training.resuming import OWN_FILES, RECIPE, last_checkpoint, write_inputs
from weightport.finetuning.training.sampling import BalancedSampler, GroupedSampler, NearbySampler
from weightport.finetuning.training.schedules import own_schedule
from weightport.finetuning.training.trainer import (
    Averaging,
    BestCheckpointOfThisRun,
    FirstCheckpoint,
    LogBeforeSaving,
    PortTrainer,
    loss_of_samples,
    loss_with_padding,
)
from weightport.formatting import samples as in_words
from weightport.version import __version__
from weightport.writing import replaced_directory


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
    prepared = prepare(job, say)
    main = prepared.arguments.process_index == 0
    # Every process has looked at the output before one makes it.
    PartialState().wait_for_everyone()
    with ExitStack() as stack:
        keep: Callable[[], None] = _nothing
        if main:
            announce(prepared)
            if not job.resume:
                keep = stack.enter_context(_begun(job, prepared))
        PartialState().wait_for_everyone()
        try:
            with _disk_faults_named(job.output):
                return _train(
                    replace(job, recipe=prepared.recipe),
                    prepared,
                    keep,
                    say=say if main else _silent,
                    quiet=quiet or not main,
                )
        except BaseException:
            # What is trained is worth keeping, also where what comes after it fails.
            if main and any((job.output / name).is_dir() for name in RESULTS):
                keep()
            raise


@contextmanager
def _disk_faults_named(run: Path) -> Iterator[None]:
    """A checkpoint that the disk did not take is an OutputError, whichever library was writing it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        left = "The checkpoints before are whole (--resume)." if last_checkpoint(run) else "Nothing was left behind."
        raise OutputError(f"The disk of {run} {fault}. {left} Make room, or choose another --output.") from error


def _begun(job: Job, prepared: Prepared) -> AbstractContextManager[Callable[[], None]]:
    """The run's folder, with the recipe that gives the run again. An earlier run stays until this one has a
    checkpoint, and comes back where it gets none; its features are taken over if they are used again."""

    def fill(folder: Path) -> None:
        comments = [f"Fine-tuned by weightport {__version__}. The same run again:"]
        comments.append(f"{job.command}  (--recipe with this file in place of the settings)")
        (folder / RECIPE).write_text(as_yaml(job.recipe, comments), encoding="utf-8")
        inputs = job.inputs(prepared.samples, prepared.eval_samples)
        write_inputs(folder, {**inputs, "step": asdict(division_of(prepared.arguments))})

    features, output = prepared.features, job.output.absolute()
    within = features is not None and features.folder.absolute().is_relative_to(output)
    carried = [str(features.folder.absolute().relative_to(output))] if features is not None and within else []
    return replaced_directory(
        job.output,
        fill,
        overwrite=job.overwrite,
        inputs=job.sources,
        beside=job.data_places,
        also=OWN_FILES,
        carried=carried,
    )


def _train(
    job: Job, prepared: Prepared, keep: Callable[[], None], *, say: Callable[[str], None], quiet: bool
) -> Outcome:
    recipe, loaded, arguments = job.recipe, prepared.loaded, prepared.arguments
    family, eval_samples = loaded.family, prepared.eval_samples
    bad, full = BadSamples(prepared.samples, recipe.data.skip_bad), FullAnswers(prepared.samples)

    features = _features(job, prepared, say)

    def collator(counted: BadSamples, *others: Any) -> Collator:
        return Collator(family, loaded.processor, loaded.model.config, recipe.batch, counted, *others)

    epoch = Epoch()
    stopping, averaged = _stopping(recipe), _averaged(recipe)
    own = [each for each in (stopping, Averaging(averaged) if averaged is not None else None) if each is not None]

    samples_per_step = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    with ProgressLine(samples_per_step, quiet=quiet) as progress:
        measuring = None
        if eval_samples is not None and recipe.evaluation.metrics:
            measuring = Measuring(job.output, recipe, prepared, eval_samples, progress, say)
        trainer = PortTrainer(
            loaded.model,
            arguments,
            data_collator=replace(
                collator(bad, features, full, _augmentation(recipe, arguments, epoch)), draft=recipe.data.draft
            ),
            train_dataset=Indexed(prepared.samples),
            eval_dataset=_subset(eval_samples, recipe) if eval_samples is not None else None,
            compute_loss_func=_loss(recipe, family),
            callbacks=[*own, LogBeforeSaving(), FirstCheckpoint(keep), BestCheckpointOfThisRun(), progress],
            samples=prepared.samples,
            eval_collator=collator(BadSamples(eval_samples, recipe.data.skip_bad)) if eval_samples else None,
            measure=measuring,
            features=prepared.features,
            by_sample=recipe.batch.loss_mean == "samples",
            undivided=recipe.batch.loss_mean == "batches",
            schedule=own_schedule(recipe.training),
            epoch=epoch,
            sampler=_sampler(prepared, epoch),
            averaged=averaged,
        )
        trainer.remove_callback(PrinterCallback)
        lost = _trained(trainer, prepared.checkpoint)
        trainer.adopt_average()
        if eval_samples is not None and not _evaluated(trainer):
            trainer.evaluate()
    notes = [*prepared.notes, *lost, *_chosen_model(trainer), *(measuring.notes if measuring else [])]
    if stopping is not None:
        notes += stopping.note(arguments, trainer.state)
    if averaged is not None:
        notes.append(
            f"measured and saved: the moving average of the weights (model.ema_decay {recipe.model.ema_decay:g})"
        )
    if bad.count:
        were, they = ("was", "it") if bad.count == 1 else ("were", "they")
        notes.append(f"{in_words(bad.count)} {were} left out while training, because {they} could not be read")
    if full.count:
        have, longest = "has an answer" if full.count == 1 else "have answers", recipe.batch.max_target_length
        notes.append(
            f"{in_words(full.count)} {have} of batch.max_target_length ({longest} tokens): what is longer is cut, and "
            "learned without its end"
        )
    return finish(job, prepared, trainer, measuring, notes)


def _stopping(recipe: Recipe) -> EarlyStopping | None:
    settings = recipe.evaluation
    if settings.early_stopping_patience is None:
        return None
    return EarlyStopping(settings.early_stopping_patience, settings.early_stopping_threshold)


def _averaged(recipe: Recipe) -> AveragedWeights | None:
    return AveragedWeights(recipe.model.ema_decay) if recipe.model.ema_decay is not None else None


def _augmentation(recipe: Recipe, arguments: TrainingArguments, epoch: Epoch) -> Augmentation | None:
    return Augmentation(recipe.batch.augment, _data_seed(arguments), epoch) if recipe.batch.augment else None


def _sampler(prepared: Prepared, epoch: Epoch) -> Sampler[int] | None:
    """The order of training samples, None for Trainer's own."""
    seed = _data_seed(prepared.arguments)
    if prepared.weights is not None:
        return BalancedSampler(prepared.weights, seed, epoch)
    if prepared.recipe.batch.sampling == "nearby":
        return NearbySampler(len(prepared.samples), seed, epoch)
    return GroupedSampler(prepared.pictures, seed, epoch) if prepared.pictures is not None else None


def _data_seed(arguments: TrainingArguments) -> int:
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def _loss(recipe: Recipe, family: Family) -> Callable[..., torch.Tensor] | None:
    """What computes the loss in place of the model, None where the model does."""
    if recipe.batch.loss_mean == "samples":
        return partial(loss_of_samples, shift=family.causal)
    # A decoder's labels count what they hold, padding too.
    counted = recipe.batch.count_padding and family.own_loss and not family.causal
    return loss_with_padding if counted or getattr(family, "mean_of_batch", False) else None


def _trained(trainer: PortTrainer, checkpoint: Path | None) -> list[str]:
    """Train to the end. A disk that is full when the last checkpoint is written does not cost the trained model, which
    takes less room: that is a note."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        state = trainer.state
        if not is_full_disk(error) or state.global_step < state.max_steps or trainer.args.world_size > 1:
            raise
        trainer.end_without_checkpoint()
        return [f"the checkpoint of step {state.global_step:,} is not kept: the disk was full"]
    return []


def _features(job: Job, prepared: Prepared, say: Callable[[str], None]) -> StoredFeatures | None:
    """Outputs of frozen parts for the training data, computed now or before; the model takes them from here on."""
    plan = prepared.features
    if plan is None:
        return None
    store = filled_store(plan, prepared.loaded, job.recipe, prepared.arguments, prepared.samples, say)
    plan.attach(prepared.loaded.model)
    return plan.stored(store)


def _evaluated(trainer: PortTrainer) -> bool:
    """Whether the model that will be saved was evaluated."""
    return any("eval_loss" in entry and entry["step"] == trainer.held_step for entry in trainer.state.log_history)


def _chosen_model(trainer: PortTrainer) -> list[str]:
    """A note on which step's model is the result, where `load_best_model_at_end` was to choose it."""
    arguments, state, step = trainer.args, trainer.state, trainer.held_step
    if not arguments.load_best_model_at_end or state.best_metric is None:
        return []
    name = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if step == state.best_global_step:
        return [f"the result is the model of step {step:,} of {state.global_step:,}, the best by {name}"]
    return [
        f"the result is the model of step {step:,}: the best by {name} was that of step {state.best_global_step:,}, "
        "where no checkpoint was saved (training.save_steps)"
    ]


def _subset(samples: Samples, recipe: Recipe) -> Any:
    return torch.utils.data.Subset(Indexed(samples), chosen(len(samples), recipe.evaluation.samples))


def _silent(line: str) -> None:
    return None


def _nothing() -> None:
    return None
