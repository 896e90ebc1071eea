"""What a finished run leaves in its folder: the model or adapter, metrics, history, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport import __version__
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.display.previews import spread
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.recipes.recipe import plain
from weightport.finetuning.setup.preparing import Job, Prepared
from weightport.finetuning.training.resuming import CHECKPOINTS
from weightport.finetuning.training.saving import METRICS, Result, save_adapter, save_model, write_json
from weightport.finetuning.training.trainer import PortTrainer
from weightport.reports.training_report import RunSummary, write_report

REPORT, HISTORY = "report.html", "history.json"
REPORTED_SAMPLES = 12


@dataclass(frozen=True)
class Outcome:
    """What a run left: the model directory or adapter, metrics by name, losses by step."""

    directory: Path
    report: Path
    metrics: Mapping[str, float]
    history: list[dict[str, Any]]
    notes: tuple[str, ...]


def finish(
    job: Job, prepared: Prepared, trainer: PortTrainer, predictions: Sequence[Prediction], notes: list[str]
) -> Outcome:
    """Save the result and its records; only the main process writes, but all may have to gather weights."""
    recipe, loaded = job.recipe, prepared.loaded
    full = recipe.model.method == "full"
    directory = job.output / ("model" if full else "adapter")
    history = trainer.state.log_history
    metrics = _final_metrics(history)
    model, weights = trainer.accelerator.unwrap_model(trainer.model), None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = job.output / CHECKPOINTS / "final"
        trainer.save_model(str(weights))
    if trainer.is_world_process_zero():
        saved = Result(
            model,
            loaded.processor if recipe.batch.image_size is not None else None,
            job.model,
            recipe.model.config,
            _training_record(job, prepared, trainer, metrics, notes),
            metrics,
            weights,
        )
        notes += save_model(saved, directory) if full else save_adapter(saved, directory)
        write_json(job.output / METRICS, metrics)
        write_json(job.output / HISTORY, history)
        write_report(job.output / REPORT, _summary(job, prepared, history, metrics, predictions, notes))
    trainer.accelerator.wait_for_everyone()
    return Outcome(directory, job.output / REPORT, metrics, history, tuple(notes))


def _summary(
    job: Job,
    prepared: Prepared,
    history: list[dict[str, Any]],
    metrics: Mapping[str, float],
    predictions: Sequence[Prediction],
    notes: list[str],
) -> RunSummary:
    shown = spread(predictions, REPORTED_SAMPLES)
    pictures = {}
    for prediction in shown:
        picture = prepared.eval_samples[prediction.index].picture if prepared.eval_samples is not None else None
        if picture is not None:
            pictures[prediction.index] = picture.read()
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
    )


def _final_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of the last evaluation by their own names, the loss as eval_loss."""
    last: Mapping[str, float] = next(
        (entry for entry in reversed(history) if any(key.startswith("eval_") for key in entry)), {}
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
        "eval_data": _data_record(prepared.eval_samples) if prepared.eval_samples is not None else None,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "processes": prepared.arguments.world_size,
        "samples_per_step": prepared.arguments.train_batch_size
        * prepared.arguments.world_size
        * prepared.arguments.gradient_accumulation_steps,
        "final_loss": losses[-1] if losses else None,
        "metrics": dict(metrics),
        "trainable": {share.part: [share.trainable, share.total] for share in prepared.shares},
        "notes": notes,
        "versions": {
            "weightport": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _data_record(samples: Samples) -> dict[str, Any]:
    return {"name": _public(samples.name), "samples": len(samples)}


def _published(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without where things lie on this machine: the record may go to the Hub."""
    data = recipe.get("data", {})
    return recipe | {"data": {**data, "images": _public(data["images"])}} if data.get("images") else recipe


def _public(name: str) -> str:
    """A Hub id as it is, of a path the last two names at most."""
    path = Path(name)
    return "/".join(path.parts[-2:]).lstrip("/") if path.exists() else name
