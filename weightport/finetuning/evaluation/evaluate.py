"""Measuring a model on a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weightport.devices import usable_device
from weightport.errors import CheckpointError, RecipeError
from weightport.finetuning.data import EntrySamples, local_places, open_data, open_divided
from weightport.finetuning.evaluation.answering import answers, chosen, write_predictions
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.family import Family
from weightport.finetuning.metrics import metric_named, score_all
from weightport.finetuning.recipes.recipe import plain
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.length_limits import fitted
from weightport.finetuning.setup.lora_layers import without_deprecations
from weightport.finetuning.setup.model_loading import Loaded, load_model, load_processor
from weightport.finetuning.setup.training_arguments import loader_workers
from weightport.finetuning.training.saving import METRICS, base_dtype, write_json
from weightport.model_directory import check_processor
from weightport.writing import require_directory, whole_directory

PREDICTIONS, EVALUATION = "predictions.jsonl", "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the answers that they were computed on."""

    metrics: Mapping[str, float]
    predictions: list[Prediction]


def evaluate(
    directory: Path,
    family: Family,
    data: str | Sequence[str],
    recipe: Recipe,
    *,
    adapter: Path | None = None,
    output: Path | None = None,
    held_out: float | None = None,
    device: str | None = None,
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda samples: None,
    advance: Callable[[int], None] = lambda samples: None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Answer the data set `data` with the model in `directory` and measure by the recipe's metrics.

    The model runs in its own dtype, whatever the recipe trains. `adapter`: a LoRA adapter to put on it. `output`: a
    folder that gets metrics.json, evaluation.json (the settings) and predictions.jsonl. `held_out`: measure on that
    share of the data alone, the one that a run with this `data.eval_fraction` did not train on; `say` gets
    lines to show while it is chosen. Raises a WeightportError for a model, data or settings that cannot be.
    """
    if not recipe.evaluation.metrics:
        raise RecipeError(f"The recipe {recipe.name!r} measures nothing: give --metric.")
    for name in recipe.evaluation.metrics:
        if metric_named(name).needs == "ranks":
            metric_named(name).score([])
    inputs = [directory, adapter]
    if output is not None:
        require_directory(output, overwrite=overwrite, inputs=inputs, beside=local_places(data))
    check_processor(directory)
    samples = measured_samples(data, recipe, held_out, say)
    processor = load_processor(directory, family, recipe.batch)
    place = usable_device(device)
    dtype = base_dtype(directory) or torch.float32
    model = load_model(directory, family, replace(recipe.model, method="full"), device=place, dtype=dtype).to(place)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    recipe, _ = fitted(recipe, Loaded(directory, model, processor, family))
    indices = chosen(len(samples), recipe.evaluation.samples)
    announce(len(indices))
    predictions = answers(
        model,
        processor,
        family,
        samples,
        indices,
        recipe.batch,
        recipe.evaluation,
        skip_bad=recipe.data.skip_bad,
        workers=loader_workers(recipe.training),
        advance=advance,
    )
    result = Evaluation(score_all(recipe.evaluation.metrics, predictions), predictions)
    if output is not None:
        write_evaluation(result, output, directory, data, samples.name, recipe, adapter=adapter, overwrite=overwrite)
    return result


def measured_samples(
    data: str | Sequence[str], recipe: Recipe, held_out: float | None, say: Callable[[str], None]
) -> EntrySamples:
    """The samples of `data`, a question with all its references each; of the share `held_out` alone where given, and
    `say` is told of pictures that are read to choose it."""
    if held_out is None:
        return open_data(data, recipe.data, grouped=True)
    return open_divided(data, recipe.data, held_out, say)[1]


def write_evaluation(
    result: Evaluation,
    output: Path,
    directory: Path,
    data: str | Sequence[str],
    name: str,
    recipe: Recipe,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write metrics.json, evaluation.json (the settings, and the data set's `name`) and predictions.jsonl into the
    folder `output`."""
    inputs = [directory, adapter]
    with whole_directory(output, overwrite=overwrite, inputs=inputs, beside=local_places(data)) as work:
        write_json(work / METRICS, dict(result.metrics))
        settings = {"data": name, "samples": len(result.predictions), "recipe": plain(recipe)}
        write_json(work / EVALUATION, settings)
        write_predictions(work / PREDICTIONS, result.predictions)


def _with_adapter(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    from weightport.adapters.verification.peft_loading import load_adapter

    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} is not an adapter: it has no adapter_config.json.")
    with without_deprecations():
        tuned: torch.nn.Module = load_adapter(model, adapter)
    return tuned
