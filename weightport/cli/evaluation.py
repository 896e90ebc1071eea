"""`weightport evaluate`: what a model answers to a data set, and how well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from weightport.cli.display import Lines, echo, names_in
from weightport.cli.finetuning import DEFAULT_RECIPE, require_extra
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option, uncollected
from weightport.errors import UsageError
from weightport.families.registry import registry
from weightport.formatting import samples


@click.command("evaluate")
@click.argument("model", type=ExistingPath())
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="PATH[:SPLIT]",
    help="Data to measure on: a file, a folder, a pattern or a Hub data set. Repeatable.",
)
@click.option(
    "--eval-fraction",
    type=float,
    metavar="SHARE",
    help="Measure on this share of the data alone: what a run with the same --eval-fraction did not train on.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="What to measure (docs/metrics.md); by default the recipe's metrics. Repeatable.",
)
@click.option(
    "--recipe",
    "recipe_name",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="Whose prompts, data layout and generation settings are used.",
)
@click.option("--adapter", type=ExistingPath(), help="A LoRA adapter on MODEL.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder for metrics.json, evaluation.json and predictions.jsonl; by default nothing is written.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of the recipe.")
@click.option("--skip-bad", type=click.IntRange(min=0), metavar="N", help="Leave out up to N samples that are broken.")
@click.option("--device", help="Where to run the model; by default a GPU where there is one.")
@click.option("--overwrite", is_flag=True, help="Replace --output if it exists.")
@quiet_option
@json_option
@command_body
def evaluate_command(
    model: Path,
    data: tuple[str, ...],
    eval_fraction: float | None,
    metrics: tuple[str, ...],
    recipe_name: str,
    adapter: Path | None,
    output: Path | None,
    assignments: tuple[str, ...],
    skip_bad: int | None,
    device: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Let the model directory MODEL answer a data set, and measure the answers."""
    require_extra()
    with uncollected():
        from weightport.finetuning.display.previews import preview_lines
        from weightport.finetuning.evaluation.evaluate import evaluate
        from weightport.finetuning.evaluation.retrieval import evaluate_retrieval
        from weightport.finetuning.metrics import headline
        from weightport.finetuning.recipes.recipe import load_recipe, parse_assignments, with_settings
        from weightport.finetuning.setup.preparing import resolved

    retrieval = registry().retrieval_of(model)
    family = registry().training_of(model) if retrieval is None else None
    listed_as = (family or retrieval).name  # type: ignore[union-attr]  # one of them is there
    recipe, _ = resolved(load_recipe(recipe_name), listed_as, as_published=False)
    settings = parse_assignments(assignments)
    if metrics:
        settings["evaluation.metrics"] = list(metrics)
    elif retrieval is not None:
        settings.setdefault("evaluation.metrics", ["recall"])
    if skip_bad is not None:
        settings["data.skip_bad"] = skip_bad
    # That of a run's recipe is a share of its training data, which is not what is measured on here.
    recipe = with_settings(recipe, {"data.eval_fraction": eval_fraction}, "--eval-fraction")
    recipe = with_settings(recipe, settings, "--set")
    if retrieval is not None and adapter is not None:
        raise UsageError("--adapter: merge it into a model for retrieval first (port-merge-lora BASE ADAPTER OUT).")
    lines = Lines(quiet=quiet or as_json)
    with lines.progress("answer", samples) as (start, advance):
        common: dict[str, Any] = {
            "output": output, "device": device, "overwrite": overwrite, "held_out": recipe.data.eval_fraction,
            "announce": start, "say": lambda line: lines.line("", line),
        }  # fmt: skip
        if retrieval is not None:
            result = evaluate_retrieval(model, retrieval, data, recipe, advance=advance, **common)
        elif family is not None:
            result = evaluate(model, family, data, recipe, adapter=adapter, advance=advance, **common)
    if as_json:
        echo(json.dumps({"metrics": dict(result.metrics), "samples": len(result.predictions)}))
        return
    for line in preview_lines(result.predictions, recipe.evaluation.previews):
        lines.line("", line)
    for name, value in headline(result.metrics).items():
        lines.line("measured", f"{name} {value:.4g}")
    if output is not None:
        lines.line(f"{output}/", names_in(output))
