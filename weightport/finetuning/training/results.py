"""What a finished run leaves in its folder: the model or adapter, metrics, history, report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.errors import DataError
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.display.gallery import SHOWN, reduced
from weightport.finetuning.display.previews import spread
from weightport.finetuning.display.report import RunSummary, write_report
from weightport.finetuning.evaluation.answering import chosen
from weightport.finetuning.evaluation.measuring import Measuring
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.recipes.recipe import plain
from weightport.finetuning.rescue import WRITING, rescued
from weightport.finetuning.setup.freezing import trained
from weightport.finetuning.setup.precision import autocast_dtype
from weightport.finetuning.setup.preparing import Job, Prepared
from weightport.finetuning.training.resuming import CHECKPOINTS
from weightport.finetuning.training.saving import METRICS, Result, in_base_dtype, save_adapter, save_model, write_json
from weightport.finetuning.training.trainer import PortTrainer
from weightport.version import __version__

REPORT, HISTORY = "report.html", "history.json"
RESULTS = ("model", "adapter")
SHOWN_NAMES = 3
"""Names of data sets in the records."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: the model directory or adapter, metrics by name, losses by step. `step`: whose model it is, and
    where the metrics were measured."""

    directory: Path
    report: Path
    metrics: Mapping[str, float]
    history: list[dict[str, Any]]
    notes: tuple[str, ...]
    step: int


def finish(
    job: Job, prepared: Prepared, trainer: PortTrainer, measuring: Measuring | None, notes: list[str]
) -> Outcome:
    """Measure the result as it is saved, save it and its records; only the main process writes, but all may have to
    gather weights."""
    recipe, loaded = job.recipe, prepared.loaded
    full = recipe.model.method == "full"
    directory = job.output / RESULTS[0 if full else 1]
    history = trainer.state.log_history
    step = trainer.held_step
    metrics = _metrics_at(history, step)
    notes += _untrained_note(_metrics_at(history, 0))
    model, weights = trainer.accelerator.unwrap_model(trainer.model), None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = job.output / CHECKPOINTS / "final"
        trainer.save_model(str(weights))
    elif full:
        trained_in = autocast_dtype(prepared.arguments) or model.dtype
        model, more = in_base_dtype(model, job.model)
        notes += more
        if measuring is not None and metrics and trained_in != model.dtype:
            metrics, more = _measured_as_saved(measuring, model, step, metrics)
            notes += more
    if trainer.is_world_process_zero():
        parts, trained_parts = loaded.family.parts, trained(prepared.shares)
        saved = Result(
            model,
            loaded.processor if recipe.batch.image_size is not None else None,
            job.model,
            recipe.model.config,
            _training_record(job, prepared, trainer, metrics, notes),
            metrics,
            weights,
            lambda name: (parts.part_of(name) or "other") in trained_parts,
        )
        predictions = measuring.predictions_at(step) if measuring is not None else []
        summary = _summary(job, prepared, history, metrics, predictions, notes, step)

        def write(folder: Path) -> None:
            (save_model if full else save_adapter)(saved, folder / directory.name)
            write_json(folder / METRICS, metrics)
            write_json(folder / HISTORY, history)
            write_report(folder / REPORT, summary)

        try:
            write(job.output)
        except WRITING as error:
            raise rescued(job.output, write, _bytes_saved(model, full=full), error) from error
        if weights is not None:
            shutil.rmtree(weights, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return Outcome(directory, job.output / REPORT, metrics, history, tuple(notes), step)


def _untrained_note(metrics: Mapping[str, float]) -> list[str]:
    """A note on what the untrained model was measured at, if it was."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    return [f"before the first step: {figures}"] if figures else []


def _bytes_saved(model: Any, *, full: bool) -> int:
    """Bytes of the weights that are written: all of a model, of an adapter what is trained."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if full or p.requires_grad)


def _measured_as_saved(
    measuring: Measuring, model: Any, step: int, before: dict[str, float]
) -> tuple[dict[str, float], list[str]]:
    """(the metrics of the model in the dtype that it is saved in, a note on what that changes). `before`: those that
    were measured in the arithmetic of training."""
    dtype = str(model.dtype).removeprefix("torch.")
    try:
        found = measuring.as_saved(model, step)
    except RuntimeError as error:
        # The trained model is not lost because this machine cannot run it so.
        return before, [f"the metrics are not those of the result in {dtype}, which does not run here: {error}"]
    changed = [
        f"{name} {value:.4g} ({before[name]:.4g} while training)"
        for name, value in found.items()
        if name in before and f"{value:.4g}" != f"{before[name]:.4g}"
    ]
    notes = [f"measured on the result in {dtype}, as it is saved: {', '.join(changed)}"] if changed else []
    return before | found, notes


def _summary(
    job: Job,
    prepared: Prepared,
    history: list[dict[str, Any]],
    metrics: Mapping[str, float],
    predictions: Sequence[Prediction],
    notes: list[str],
    step: int,
) -> RunSummary:
    shown = spread(predictions, SHOWN)
    pictures = {}
    for prediction in shown:
        # A picture that is gone meanwhile costs the report a picture, not the run its result.
        with suppress(DataError):
            picture = prepared.eval_samples[prediction.index].picture if prepared.eval_samples is not None else None
            if picture is not None:
                # Small at once: those of a whole page would fill the memory.
                pictures[prediction.index] = reduced(picture.read())
    return RunSummary(
        title=f"{job.recipe.title}: {job.model.resolve().name}",
        command=job.command,
        settings=plain(job.recipe),
        trainable=[(share.part, share.trainable, share.total) for share in prepared.shares],
        history=history,
        metrics=metrics,
        predictions=predictions,
        pictures=pictures,
        notes=[*job.mistakes, *notes],
        measured_at=step,
    )


def _metrics_at(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Metrics of the evaluation at `step` by their own names, the loss as eval_loss."""
    last: Mapping[str, float] = next(
        (entry for entry in reversed(history) if entry.get("step") == step and "eval_loss" in entry), {}
    )
    timings = ("runtime", "per_second", "preparation_time", "compilation_time")
    return {
        key if key == "eval_loss" else key.removeprefix("eval_"): value
        for key, value in last.items()
        if key.startswith("eval_") and not key.endswith(timings)
    }


def _training_record(
    job: Job, prepared: Prepared, trainer: PortTrainer, metrics: Mapping[str, float], notes: list[str]
) -> dict[str, Any]:
    import transformers

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "format": 1,
        "recipe": _published(plain(job.recipe)),
        "as_published": bool(job.mistakes),
        "base": job.model.resolve().name,
        "data": _data_record(prepared.samples),
        "eval_data": _evaluated_record(job, prepared),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "result_step": trainer.held_step,
        "processes": prepared.arguments.world_size,
        "samples_per_step": prepared.arguments.train_batch_size
        * prepared.arguments.world_size
        * prepared.arguments.gradient_accumulation_steps,
        "final_loss": losses[-1] if losses else None,
        "metrics": dict(metrics),
        "metrics_untrained": _metrics_at(trainer.state.log_history, 0) or None,
        "trainable": {share.part: [share.trainable, share.total] for share in prepared.shares},
        "notes": notes,
        "versions": {
            "weightport": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _data_record(samples: Samples) -> dict[str, Any]:
    return {"name": _public_names(samples), "samples": len(samples)}


def _evaluated_record(job: Job, prepared: Prepared) -> dict[str, Any] | None:
    """The data that metrics were measured on."""
    samples = prepared.eval_samples
    if samples is None:
        return None
    return {
        "name": _public_names(samples),
        "samples": len(chosen(len(samples), job.recipe.evaluation.samples)),
    }


def _published(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without where things lie on this machine: the record may go to the Hub."""
    data = recipe.get("data", {})
    if not data.get("images"):
        return recipe
    return recipe | {"data": {**data, "images": [_public(each) for each in data["images"]]}}


def _public_names(samples: Samples) -> str:
    names = getattr(samples, "names", (samples.name,))
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(map(_public, names[:SHOWN_NAMES])) + more


def _public(name: str) -> str:
    """A Hub id as it is, of a path the last two names at most."""
    path = Path(name)
    return "/".join(path.parts[-2:]).lstrip("/") if path.exists() else name
