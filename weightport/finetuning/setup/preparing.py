"""A run before its first step: everything that can be checked is checked here, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments, set_seed

from weightport.errors import DataError, OutputError, RecipeError, TrainingError
from weightport.finetuning import activation_checkpointing
from weightport.finetuning.augmentation import require_changes
from weightport.finetuning.data import EntrySamples, local_places, open_data, open_divided
from weightport.finetuning.data.collation import FAILURE, BadSamples, Collator, Indexed
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.evaluation.answering import chosen, generation_options
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.family import Family, prompt_of
from weightport.finetuning.features.plan import FeaturePlan, plan_features
from weightport.finetuning.metrics import metric_named, score_all
from weightport.finetuning.overlap import overlap_note
from weightport.finetuning.recipes.recipe import for_family
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.batch_size import (
    Division,
    division_of,
    fitting_division,
    require_searchable,
)
from weightport.finetuning.setup.freezing import Share, freeze, frozen_parts, shares
from weightport.finetuning.setup.length_limits import fitted
from weightport.finetuning.setup.lora_layers import with_lora
from weightport.finetuning.setup.model_loading import Loaded, load_model, load_processor
from weightport.finetuning.setup.training_arguments import planned_steps, shares_weights_out, training_arguments
from weightport.finetuning.training.resuming import (
    RECIPE,
    changed_inputs,
    last_checkpoint,
    recorded_division,
    require_same,
)
from weightport.finetuning.training.sampling import class_weights, pictures_of
from weightport.formatting import samples as in_words
from weightport.formatting import size
from weightport.model_directory import check_processor
from weightport.writing import remove_abandoned, require_directory

RECONNAISSANCE = 64
"""Samples of the evaluation data that are scored before the first step."""


@dataclass(frozen=True)
class Job:
    """What a run is asked for. `data` and `eval_data`: one data set, or several as one. `explicit`: settings given by
    hand; `command`: how, for the records."""

    model: Path
    family: Family
    data: str | tuple[str, ...]
    output: Path
    recipe: Recipe
    eval_data: str | tuple[str, ...] | None = None
    resume: bool = False
    overwrite: bool = False
    explicit: frozenset[str] = frozenset()
    command: str = ""
    mistakes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Path, ...]:
        """What the run is made from, which its folder may neither hold nor lie in."""
        return (self.model,)

    @property
    def data_places(self) -> tuple[Path, ...]:
        """What else is read, which its folder may not hold."""
        named = (self.data, self.eval_data, self.recipe.data.images)
        return tuple(place for each in named if each for place in local_places(each))

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to measure on."""
        return self.eval_data is not None or self.recipe.data.eval_fraction is not None

    def inputs(self, samples: Samples, eval_samples: Samples | None) -> dict[str, Any]:
        """What it is trained and measured on, for the records of --resume."""
        return {
            "model": str(self.model.resolve()),
            "data": samples.name,
            "samples": len(samples),
            "content": samples.content,
            "eval_data": None if eval_samples is None else eval_samples.name,
            "eval_content": None if eval_samples is None else eval_samples.content,
        }


@dataclass(frozen=True)
class Prepared:
    """A run before its first step: everything has been opened and checked, nothing written. `recipe` is the job's,
    fitted to the model. `weights`: of each sample, how often it is drawn against the others, where that differs;
    `pictures`: equal where samples that go together have the same picture."""

    loaded: Loaded
    arguments: TrainingArguments
    samples: Samples
    eval_samples: Samples | None
    shares: list[Share]
    checkpoint: Path | None
    notes: tuple[str, ...]
    recipe: Recipe
    features: FeaturePlan | None = None
    weights: np.ndarray | None = None
    pictures: np.ndarray | None = None


def resolved(recipe: Recipe, family: str, *, as_published: bool) -> tuple[Recipe, tuple[str, ...]]:
    """(the recipe for the model's family, what its guide does wrong). Raises RecipeError, CheckpointError."""
    mistakes = recipe.published[family].mistakes if as_published and family in recipe.published else ()
    if as_published and family not in recipe.published:
        raise RecipeError(f"The recipe {recipe.name!r} follows no published guide for {family!r}.")
    return for_family(recipe, family, as_published=as_published), mistakes


def prepare(job: Job, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Open and check everything: recipe and model, data, output, space. Writes nothing. `say` gets a line now and then
    while pictures are read to choose what is measured on."""
    recipe = job.recipe
    family = job.family
    check_processor(job.model)
    if family.name not in recipe.families:
        recipe = for_family(recipe, family.name)
    _require_meaning(family, recipe)
    frozen = frozen_parts(family.parts, recipe.model.freeze)
    for name in recipe.evaluation.metrics:
        metric_named(name)
    checkpoint = _output_state(job)
    arguments, notes = training_arguments(
        recipe.training,
        job.output,
        evaluates=job.evaluates,
        leaves_unused=family.leaves_unused and recipe.model.method == "full",
        stops_early=recipe.evaluation.early_stopping_patience is not None,
        explicit=job.explicit,
    )
    _require_together(recipe, arguments)
    samples, eval_samples = _opened(job, recipe, say if arguments.process_index == 0 else _silent)
    notes += samples.notes
    for each in (samples, eval_samples):
        if each is not None and each.skipped:
            are, more = ("is", "") if len(each.skipped) == 1 else ("are", " …")
            notes.append(f"{in_words(len(each.skipped))} of {each.name} {are} left out: {each.skipped[0]}{more}")
    if job.resume:
        notes += changed_inputs(job.output, job.inputs(samples, eval_samples))
        if checkpoint is None:
            notes.append("there is no checkpoint to resume from: the run begins again at its first step")
        else:
            # The untrained model has been measured.
            arguments.eval_on_start = False
        notes += _as_divided_before(job.output, recipe, arguments)
    if eval_samples is not None and arguments.process_index == 0 and (note := overlap_note(samples, eval_samples)):
        notes.append(note)
    steps = planned_steps(arguments, len(samples))
    if (warm_up := arguments.get_warmup_steps(steps)) > steps:
        notes.append(
            f"the run ends after {steps:,} of {warm_up:,} warm-up steps, before the learning rate is reached: lower "
            "training.warmup_steps, as 0.05 for a share of the steps"
        )
    if eval_samples is not None:
        _require_measurable(eval_samples, recipe, arguments)
    require_changes(recipe.batch.augment, samples)
    weights = class_weights(samples) if recipe.batch.sampling == "balanced" else None
    pictures = pictures_of(samples) if recipe.batch.group_by_image else None

    loaded, features = _trainable(job.model, family, recipe, arguments, frozen), None
    found = shares(loaded.model, family.parts)
    if not any(share.trainable for share in found):
        raise TrainingError(
            f"Nothing is left to train: {', '.join(recipe.model.freeze)} together are the whole model. Freeze less."
        )
    _require_space(
        job.output,
        found,
        arguments,
        adapter=recipe.model.method != "full",
        averaged=recipe.model.ema_decay is not None,
    )
    recipe, fitting = fitted(recipe, loaded)
    notes += fitting
    # A few samples show whether prompts and answers fit the model, before any step does.
    _require_askable(loaded, recipe, samples, eval_samples)
    _try_one(loaded, recipe, samples)
    if recipe.batch.fit_memory and not (job.resume and recorded_division(job.output)):
        division, note = fitting_division(loaded, recipe, arguments, samples)
        division.apply(arguments)
        notes.append(note)
    if recipe.model.cache_features:
        features = plan_features(loaded, recipe, arguments, samples, frozen, job.output)
        notes.append(features.note())
    return Prepared(
        loaded,
        arguments,
        samples,
        eval_samples,
        found,
        checkpoint,
        tuple(notes),
        recipe,
        features,
        weights,
        pictures,
    )


def _require_together(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raises RecipeError for settings that cannot be had together."""
    batch, model, sharded = recipe.batch, recipe.model, shares_weights_out(arguments)
    require_searchable(recipe, arguments, sharded=sharded is not None)
    if model.ema_decay is not None and not 0 < model.ema_decay < 1:
        raise RecipeError(f"model.ema_decay is {model.ema_decay:g}. It lies between 0 and 1, such as 0.999.")
    if model.ema_decay is not None and sharded:
        raise RecipeError(
            f"model.ema_decay averages whole weights in every process, and {sharded} shares them out. Leave one "
            "of them out."
        )
    if model.cache_features and batch.augment:
        raise RecipeError(
            f"--cache-features keeps what is computed of each picture once, and batch.augment "
            f"({', '.join(batch.augment)}) changes pictures in every epoch. Leave one of them out."
        )
    if batch.group_by_image and not model.cache_features:
        raise RecipeError(
            "batch.group_by_image lets samples share what --cache-features keeps of their picture: it does nothing "
            "without. Pass both."
        )
    if batch.group_by_image and arguments.torch_compile:
        raise RecipeError("batch.group_by_image and training.torch_compile do not go together: leave one of them out.")
    order = arguments.train_sampling_strategy
    asked = [
        name
        for name, wanted in (
            (f"batch.sampling={batch.sampling}", batch.sampling != "plain"),
            ("batch.group_by_image", batch.group_by_image),
            (f"training.train_sampling_strategy={order}", order != "random"),
        )
        if wanted
    ]
    if len(asked) > 1:
        raise RecipeError(f"{' and '.join(asked)} are two orders of samples: set one of them.")


def _as_divided_before(run: Path, recipe: Recipe, arguments: TrainingArguments) -> list[str]:
    """Let a step have the samples that it had when the run in the folder `run` was started, in as many processes as
    there are now; a note on what that changes. Raises TrainingError when they cannot share them."""
    before = recorded_division(run)
    if before is None:
        return []
    then = Division(**before)
    now = then.among(arguments.world_size)
    wanted = division_of(arguments)
    now.apply(arguments)
    if now != then and recipe.batch.loss_mean == "batches":
        raise TrainingError(
            f"The run was started in {then.processes} processes, and with batch.loss_mean=batches another number of "
            "them has another loss. Resume in as many."
        )
    if now.processes != then.processes:
        processes = "1 process" if then.processes == 1 else f"{then.processes} processes"
        return [f"the run was started in {processes}: {now.described}, as before"]
    return [] if now == wanted else [f"as when the run was started: {now.described}"]


def _opened(job: Job, recipe: Recipe, say: Callable[[str], None]) -> tuple[EntrySamples, EntrySamples | None]:
    """(what to train on, what to measure on)."""
    fraction = recipe.data.eval_fraction
    if job.eval_data is not None and fraction is not None:
        raise RecipeError(
            f"--eval-data gives what to measure on, and data.eval_fraction={fraction:g} takes it out of the training "
            "data: give one of them."
        )
    if fraction is not None:
        return open_divided(job.data, recipe.data, fraction, say)
    evaluation = open_data(job.eval_data, recipe.data, grouped=True) if job.eval_data is not None else None
    return open_data(job.data, recipe.data), evaluation


def _require_meaning(family: Family, recipe: Recipe) -> None:
    """Raises RecipeError for settings of an encoder and a loss that a causal family does not have."""
    smoothed = recipe.training.get("label_smoothing_factor")
    if recipe.batch.loss_mean == "samples" and (smoothed or recipe.batch.count_padding):
        other = "training.label_smoothing_factor" if smoothed else "batch.count_padding"
        raise RecipeError(f"batch.loss_mean=samples and {other} are two losses: set one of them.")
    if not family.causal or getattr(family, "counts_padding", False):
        return
    for name in ("count_padding", "attend_padding"):
        if getattr(recipe.batch, name):
            raise RecipeError(
                f"batch.{name} is for models with an encoder: {family.name} reads prompt and answer in one sequence, "
                "whose padding is never seen."
            )


def _trainable(
    directory: Path, family: Family, recipe: Recipe, arguments: TrainingArguments, frozen: frozenset[str]
) -> Loaded:
    """The model as it is trained: frozen parts still, adapters in place, drawn from the recipe's seed."""
    set_seed(arguments.seed)
    processor = load_processor(directory, family, recipe.batch)
    model = load_model(directory, family, recipe.model, device=arguments.device)
    generation_options(model, recipe.evaluation.generation)
    recomputing = activation_checkpointing.is_asked_for(arguments)
    if recomputing:
        # Keys are not kept while activations are computed again; transformers would say so at every start.
        model.config.use_cache = model.config.get_text_config(decoder=True).use_cache = False
    if arguments.label_smoothing_factor and family.smooth_labels(model, arguments.label_smoothing_factor):
        arguments.label_smoothing_factor = 0.0
    elif arguments.label_smoothing_factor and family.causal:
        # Trainer's own holds each logit against the label of its column, where it should be the next one's.
        raise RecipeError(f"training.label_smoothing_factor: {family.name} has no label smoothing.")
    freeze(model, family.parts, frozen, still=recipe.model.frozen_mode == "eval")
    if recipe.model.method == "qlora":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recomputing)
    if recipe.model.method != "full":
        model = with_lora(model, family.parts, frozen, recipe.lora)
    return Loaded(directory, model, processor, family)


def _require_measurable(samples: Samples, recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raises DataError when the recipe's metrics cannot be computed on this data: perfect answers show it. Raises
    RecipeError when the best model is chosen by a metric that is not among them."""
    found = []
    for index in chosen(len(samples), min(RECONNAISSANCE, recipe.evaluation.samples or RECONNAISSANCE)):
        try:
            sample = samples[index]
        except DataError:
            # Whether it may be left out is decided where it is read.
            continue
        key = sample.picture.key if sample.picture else ""
        text, references = (sample.references or ("",))[0], sample.references
        found.append(Prediction(index, sample.place, key, "", text, references, sample.objects, sample.objects))
    measured = ["loss", *score_all(recipe.evaluation.metrics, found)] if recipe.evaluation.metrics else ["loss"]
    best = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if arguments.load_best_model_at_end and best not in measured:
        raise RecipeError(
            f"training.metric_for_best_model is {best!r}, and what is measured is {', '.join(measured)}."
        )


def _output_state(job: Job) -> Path | None:
    """The checkpoint to resume from, if any. Raises OutputError when the output may not be used."""
    # A run that was killed before its first checkpoint gives way to the one that it was to replace.
    remove_abandoned(job.output.absolute().parent)
    if job.resume:
        require_same(job.output, job.recipe)
        # What the user made of the result is not replaced, and said before the training.
        result = job.output / ("model" if job.recipe.model.method == "full" else "adapter")
        require_directory(result, overwrite=True, inputs=job.sources, beside=job.data_places)
        return last_checkpoint(job.output)
    if not job.overwrite and (job.output / RECIPE).is_file():
        raise OutputError(
            f"{job.output} exists. Pass --resume to go on with it, --overwrite to replace it, or choose another "
            "output."
        )
    require_directory(job.output, overwrite=job.overwrite, inputs=job.sources, beside=job.data_places)
    return None


def _require_space(
    output: Path, found: list[Share], arguments: TrainingArguments, *, adapter: bool, averaged: bool = False
) -> None:
    """Raises OutputError when the disk cannot hold the result and the checkpoints that the run keeps."""
    trainable = sum(share.trainable for share in found)
    # An adapter is what is trained; a model is saved whole.
    saved = trainable if adapter else sum(share.total for share in found)
    # float32 weights, Adam's two moments of what is trained, and its average; one more while the oldest is not yet
    # removed.
    checkpoint = 4 * saved + (12 if averaged else 8) * trainable
    kept = 0 if arguments.save_strategy == "no" else (arguments.save_total_limit or 3) + 1
    needs = kept * checkpoint + 4 * saved
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needs > free:
        checkpoints = f" with {kept} checkpoints" if kept else ""
        raise OutputError(
            f"{existing} has {size(free)} free, and the result{checkpoints} needs about {size(needs)}. "
            "Lower training.save_total_limit, or choose another --output."
        )


def _require_askable(loaded: Loaded, recipe: Recipe, *data: Samples | None) -> None:
    """Raises DataError for a sample that the family's prompts cannot hold, unless bad ones may be left out."""
    for samples in data:
        if samples is None or recipe.data.skip_bad:
            continue
        for index in chosen(len(samples), RECONNAISSANCE):
            try:
                sample = samples[index]
            except DataError:
                # Said, with what to do, where it is read.
                continue
            prompt_of(loaded.family, loaded.processor, recipe.batch, sample)


def _try_one(loaded: Loaded, recipe: Recipe, samples: Samples) -> None:
    """Raises DataError or RecipeError when the first readable sample does not become a batch."""
    bad = BadSamples(samples, recipe.data.skip_bad)
    collator = Collator(loaded.family, loaded.processor, loaded.model.config, recipe.batch, bad)
    indexed = Indexed(samples)
    for index in range(min(len(samples), bad.allowed + 1)):
        made = collator([indexed[index]])
        if FAILURE not in made:
            return
    raise DataError(made[FAILURE])


def _silent(line: str) -> None:
    return None
