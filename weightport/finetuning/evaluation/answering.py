"""Answers of a model to a data set, one process or many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import GenerationConfig

from weightport.errors import DataError, RecipeError
from weightport.finetuning import activation_checkpointing
from weightport.finetuning.data.collation import Indexed, Questioner, Questions
from weightport.finetuning.data.samples import Objects, Samples, left_to_skip
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.family import Family
from weightport.finetuning.recipes.settings import BatchSettings, EvaluationSettings
from weightport.writing import own_file


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1


def chosen(samples: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` samples spread evenly over a data set of `samples`; all by default."""
    if wanted is None or wanted >= samples:
        return list(range(samples))
    return [i * samples // wanted for i in range(wanted)]


def answers(
    model: Any,
    processor: Any,
    family: Family,
    samples: Samples,
    indices: Sequence[int],
    batch: BatchSettings,
    settings: EvaluationSettings,
    *,
    skip_bad: int = 0,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    world: World | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Prediction]:
    """What `model` generates for the samples at `indices`, in their order, in every process the same list.

    `autocast`: dtype of mixed precision, None for the model's own. `skip_bad`: samples of the data set that may be
    left out, those that opening left out included. Raises DataError for one more that cannot be read, RecipeError for
    generation settings that do not exist.
    """
    world = world or World()
    options = generation_options(model, settings.generation)
    mine = list(indices)[world.rank :: world.size]
    if len(mine) * world.size < len(indices) or not mine:
        # Processes that share weights out answer in step: as many batches in each.
        mine += list(indices)[:1]
    loader = DataLoader(
        Subset(Indexed(samples), mine),
        batch_size=settings.batch_size,
        collate_fn=Questioner(family, processor, batch, skip=skip_bad > 0),
        num_workers=workers,
    )
    found: list[Prediction] = []
    skipped: list[str] = []
    with evaluating(model):
        for questions in loader:
            if isinstance(questions, str):
                raise DataError(questions)
            skipped += questions.skipped
            if len(skipped) > left_to_skip(samples, skip_bad):
                raise DataError(f"More than {skip_bad} samples are bad (--skip-bad {skip_bad}): {skipped[0]}")
            if questions.indices:
                found += _answered(model, processor, family, batch, options, questions, autocast)
            advance(len(questions.indices))
    if world.size > 1:
        from accelerate.utils import gather_object

        found = list({prediction.index: prediction for prediction in gather_object(found)}.values())
    return sorted(found, key=lambda prediction: prediction.index)


def _answered(
    model: Any,
    processor: Any,
    family: Family,
    batch: BatchSettings,
    options: Mapping[str, Any],
    questions: Questions,
    autocast: torch.dtype | None,
) -> Iterator[Prediction]:
    device = next(model.parameters()).device
    inputs = {name: _placed(tensor, device, model.dtype) for name, tensor in questions.inputs.items()}
    asked = questions.inputs["input_ids"].shape[1] if family.causal else 0
    total = family.room(processor, model.config).total
    if total is not None:
        options = within_budget(model.generation_config, options, asked, total)
    with torch.no_grad(), torch.autocast(device.type, autocast) if autocast else nullcontext():
        ids = model.generate(**inputs, **options).cpu()
    # A decoder alone returns the prompt before the answer.
    ids = ids[:, asked:]
    for row, index, sample, prompt, size in zip(
        ids, questions.indices, questions.samples, questions.prompts, questions.sizes
    ):
        answer = family.read(processor, batch, row, size)
        yield Prediction(
            index,
            sample.place,
            sample.picture.key if sample.picture else "",
            prompt,
            answer.text,
            sample.references,
            answer.objects,
            sample.objects,
        )


def generation_options(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's settings for `generate`. Raises RecipeError for one that does not exist or cannot be."""
    known = GenerationConfig().to_dict()
    for name in settings:
        if name not in known:
            raise RecipeError(f"evaluation.generation.{name}: transformers' generate has no such setting.")
    options = dict(settings)
    # Two limits at once make transformers warn about the one that loses: the model's own gives way to the recipe's.
    if "max_new_tokens" in options:
        options["max_length"] = None
    elif "max_length" in options:
        options["max_new_tokens"] = None
    try:
        config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **options})
        config.validate()
    except (ValueError, TypeError) as error:
        raise RecipeError(f"evaluation.generation: {error}") from error
    return options


def within_budget(own: GenerationConfig, options: Mapping[str, Any], asked: int, total: int) -> dict[str, Any]:
    """The settings for `generate`, its limit no larger than `total` columns allow behind a prompt of `asked`. `own`:
    the model's settings, which count where `options` say nothing."""
    limits = {name: options.get(name, getattr(own, name)) for name in ("max_new_tokens", "max_length")}
    if limits["max_new_tokens"] is not None:
        return {**options, "max_new_tokens": min(limits["max_new_tokens"], total - asked), "max_length": None}
    # It counts the prompt too.
    return {**options, "max_length": min(limits["max_length"] or total, total)}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, with its cache, and as it was when the block ends."""
    training = model.training
    checkpointing = activation_checkpointing.is_on(model)
    if checkpointing:
        activation_checkpointing.disable(model)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if checkpointing:
            activation_checkpointing.enable(model)


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line."""
    with own_file(path) as work:
        lines = [json.dumps(asdict(each), ensure_ascii=False) for each in predictions]
        work.write_text("\n".join([*lines, ""]), encoding="utf-8")


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote; nothing where the file is gone or not whole."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [
            Prediction(
                **{**row, "references": tuple(row["references"])}
                | {name: _objects(row[name]) for name in ("found", "expected")}
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _objects(row: Mapping[str, Any] | None) -> Objects | None:
    if row is None:
        return None
    boxes = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in row["boxes"])
    width, height = row["size"]
    scores = None if row["scores"] is None else tuple(row["scores"])
    return Objects(tuple(row["labels"]), boxes, (width, height), scores)


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
