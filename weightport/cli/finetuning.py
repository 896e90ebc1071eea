"""`port-finetune` and `weightport recipes`: train a converted model by a recipe."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightport.cli.display import Lines, echo, names_in
from weightport.cli.paths import ExistingPath
from weightport.cli.processes import OneErrorCommand, one_error
from weightport.cli.running import INTERRUPTED, Terminated, command_body, fail, json_option, quiet_option, uncollected
from weightport.errors import UsageError
from weightport.extras import install_command
from weightport.families.registry import registry
from weightport.formatting import count, samples

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from weightport.finetuning.recipes.settings import Recipe
    from weightport.finetuning.setup.preparing import Job, Prepared

DEFAULT_RECIPE = "default"


@click.command("port-finetune", cls=OneErrorCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=ExistingPath())
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="PATH[:SPLIT]",
    help="Training data: a file, a folder, a pattern such as 'shard-{000..127}.tar' or a Hub data set; see "
    "docs/finetuning.md. Repeatable.",
)
@click.option(
    "--data-weights",
    metavar="W,W,…",
    help="How often an epoch takes each --data: 2 twice, 0.5 half of its samples.",
)
@click.option(
    "--eval-data",
    multiple=True,
    metavar="PATH[:SPLIT]",
    help="Data to measure on, in any layout. Without it nothing is measured. Repeatable.",
)
@click.option(
    "--eval-fraction",
    type=float,
    metavar="SHARE",
    help="Measure on this share of the training data instead, such as 0.05, and do not train on it.",
)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the run: checkpoints and result."
)
@click.option(
    "--recipe",
    "recipe_name",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="A published recipe (`weightport recipes`), a file of your own, or a run's recipe.yaml.",
)
@click.option(
    "--method", type=click.Choice(("full", "lora", "qlora")), help="What is trained; by default the recipe's."
)
@click.option(
    "--freeze",
    multiple=True,
    metavar="PART",
    help="Parts that stand still, in place of the recipe's, as the family calls them (vision, projector, language, "
    "…), or none. Repeatable, or with commas.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting of the recipe, of transformers' TrainingArguments and GenerationConfig, or of peft's "
    "LoraConfig: learning_rate=1e-5. Repeatable.",
)
@click.option("--as-published", is_flag=True, help="Do as the recipe's guide does, mistakes included, and say which.")
@click.option(
    "--cache-features", is_flag=True, help="Compute the outputs of frozen parts once, and keep them on disk."
)
@click.option(
    "--batch-size",
    metavar="N|auto",
    help="Samples that a process holds at a time; auto: as many as fit, accumulated to the recipe's samples a step.",
)
@click.option(
    "--augment",
    multiple=True,
    metavar="CHANGE",
    help="Change training pictures at random: color, blur, noise, jpeg, rotate, flip. Repeatable, or with commas.",
)
@click.option("--balance", is_flag=True, help="Draw the classes of the data equally often.")
@click.option("--group-by-image", is_flag=True, help="Let batches hold the samples of the same pictures.")
@click.option("--ema", type=float, metavar="DECAY", help="Measure and save a moving average of the weights: 0.999.")
@click.option(
    "--early-stopping",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N evaluations in a row that were not better than the best (metric_for_best_model).",
)
@click.option("--eval-on-start", is_flag=True, help="Measure the untrained model too, before the first step.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the model with torch.compile.")
@click.option("--skip-bad", type=click.IntRange(min=0), metavar="N", help="Leave out up to N samples that are broken.")
@click.option("--resume", is_flag=True, help="Go on with the run in --output from its last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@quiet_option
@json_option
@command_body
@one_error
def port_finetune(
    model: Path,
    data: tuple[str, ...],
    data_weights: str | None,
    eval_data: tuple[str, ...],
    eval_fraction: float | None,
    output: Path,
    recipe_name: str,
    method: str | None,
    freeze: tuple[str, ...],
    assignments: tuple[str, ...],
    as_published: bool,
    cache_features: bool,
    batch_size: str | None,
    augment: tuple[str, ...],
    balance: bool,
    group_by_image: bool,
    ema: float | None,
    early_stopping: int | None,
    eval_on_start: bool,
    compiled: bool,
    skip_bad: int | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fine-tune the model directory MODEL on data by a recipe, on one process or under torchrun or accelerate launch.
    The result is OUTPUT/model (or OUTPUT/adapter), with its metrics and OUTPUT/report.html."""
    require_extra()
    with uncollected():
        from weightport.finetuning.metrics import headline
        from weightport.finetuning.recipes.recipe import load_recipe, parse_assignments, qualified, with_settings
        from weightport.finetuning.setup.preparing import Job, resolved
        from weightport.finetuning.training.run import finetune

    if resume and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite replaces it: give one of them.")
    family = registry().training_of(model)
    recipe, mistakes = resolved(load_recipe(recipe_name), family.name, as_published=as_published)
    assigned = parse_assignments(assignments)
    given = {
        "model.method": method,
        "model.freeze": _words(freeze),
        "model.cache_features": cache_features or None,
        "batch.augment": _words(augment),
        "batch.sampling": "balanced" if balance else None,
        "batch.group_by_image": group_by_image or None,
        "model.ema_decay": ema,
        "evaluation.early_stopping_patience": early_stopping,
        "training.eval_on_start": eval_on_start or None,
        "training.torch_compile": compiled or None,
        "data.skip_bad": skip_bad,
        "data.weights": data_weights.split(",") if data_weights is not None else None,
        "data.eval_fraction": eval_fraction,
        **_batch_size(batch_size),
    }
    options = {name: value for name, value in given.items() if value is not None}
    recipe = with_settings(recipe, options, "command line")
    recipe = with_settings(recipe, assigned, "--set")
    job = Job(
        model=model,
        family=family,
        data=data,
        output=output,
        recipe=recipe,
        eval_data=eval_data or None,
        resume=resume,
        overwrite=overwrite,
        explicit=frozenset(qualified(key, "--set") for key in assigned),
        command=shlex.join(["port-finetune", *sys.argv[1:]]),
        mistakes=mistakes,
    )
    lines = Lines(quiet=quiet or as_json)

    told: set[str] = set()

    def announce(prepared: Prepared) -> None:
        _show_start(lines, job, prepared)
        told.update(prepared.notes)

    try:
        outcome = finetune(job, announce=announce, say=lambda line: lines.line("", line), quiet=quiet or as_json)
    except (KeyboardInterrupt, Terminated) as signalled:
        _stopped(output, 128 + signal.SIGTERM if isinstance(signalled, Terminated) else INTERRUPTED)
    if not _is_main():
        return
    if as_json:
        found = {
            "directory": str(outcome.directory),
            "report": str(outcome.report),
            "metrics": dict(outcome.metrics),
            "step": outcome.step,
            "notes": list(outcome.notes),
        }
        echo(json.dumps(found, ensure_ascii=False))
        return
    last = max((entry.get("step", 0) for entry in outcome.history), default=outcome.step)
    where = "" if outcome.step == last else f" · at step {outcome.step:,}"
    for name, value in headline(outcome.metrics).items():
        lines.line("measured", f"{name} {value:.4g}{where}")
    for note in outcome.notes:
        if note not in told:
            lines.line("note", note)
    lines.line(f"{outcome.directory}/", names_in(outcome.directory))
    lines.line("report", str(outcome.report))
    lines.line("next", _next(model, outcome.directory))


def _words(given: tuple[str, ...]) -> list[str] | None:
    """Names from an option that can be repeated and takes commas; `none` is no name. None where it was not given."""
    return [word for each in given for word in each.split(",") if word != "none"] if given else None


def _batch_size(given: str | None) -> dict[str, Any]:
    """The settings of `--batch-size`. Raises UsageError."""
    if given is None:
        return {}
    if given == "auto":
        return {"batch.fit_memory": True}
    if not given.isdecimal() or not int(given):
        raise UsageError(f"--batch-size is {given!r}. It is a number of samples, or auto.")
    return {"training.per_device_train_batch_size": int(given)}


def _show_start(lines: Lines, job: Job, prepared: Prepared) -> None:
    from weightport.finetuning.setup.training_arguments import planned_steps

    total = sum(share.total for share in prepared.shares)
    trainable = sum(share.trainable for share in prepared.shares)
    lines.heading(f"{job.model} · recipe {job.recipe.name}: {job.recipe.title}")
    for mistake in job.mistakes:
        lines.line("wrong", mistake)
    for share in prepared.shares:
        trained = f"{count(share.trainable)} of {count(share.total)} trained"
        lines.line("part", f"{share.part}: {trained if share.trainable else f'{count(share.total)}, stands still'}")
    lines.line("trained", f"{count(trainable)} of {count(total)} parameters ({trainable / total:.2%})")
    arguments = prepared.arguments
    lines.line("data", f"{samples(len(prepared.samples))}{_measured_on(job, prepared)}")
    steps = planned_steps(arguments, len(prepared.samples))
    # max_steps decides where it is given, whatever num_train_epochs says.
    epochs = "" if arguments.max_steps > 0 else f" in {arguments.num_train_epochs:g} epoch"
    lines.line(
        "steps",
        f"{steps:,}{epochs}{'s' if epochs and arguments.num_train_epochs != 1 else ''}{_left(prepared, steps)}"
        f" · learning rate {arguments.learning_rate:g}",
    )
    lines.line("batch", _batch(arguments))
    for note in prepared.notes:
        lines.line("note", note)


def _left(prepared: Prepared, steps: int) -> str:
    """What a resumed run has before it."""
    from weightport.finetuning.training.resuming import checkpoint_step

    if prepared.checkpoint is None:
        return ""
    done = checkpoint_step(prepared.checkpoint) or 0
    return f", {max(steps - done, 0):,} to go (resumed from {prepared.checkpoint.name})"


def _batch(arguments: TrainingArguments) -> str:
    """The samples of a step, and how they are shared out."""
    held, processes = arguments.train_batch_size, arguments.world_size
    accumulated = arguments.gradient_accumulation_steps
    factors = [f"{held} at a time"]
    factors += [f"{accumulated} accumulated"] if accumulated > 1 else []
    factors += [f"{processes} processes"] if processes > 1 else []
    every = " × ".join(factors) if len(factors) > 1 else ""
    where = f"1 process on {arguments.device}" if processes == 1 else f"on {arguments.device.type}"
    return " · ".join(filter(None, (f"{samples(held * processes * accumulated)} a step", every, where)))


def _measured_on(job: Job, prepared: Prepared) -> str:
    """How many samples answers are measured on, and of how many."""
    if prepared.eval_samples is None:
        return " · nothing is measured (--eval-data, --eval-fraction)"
    every, wanted = len(prepared.eval_samples), job.recipe.evaluation.samples
    return (
        f" · measured on {every:,}" if wanted is None or wanted >= every else f" · measured on {wanted:,} of {every:,}"
    )


def _next(model: Path, directory: Path) -> str:
    made = shlex.quote(str(directory))
    if directory.name == "adapter":
        return f"port-merge-lora {shlex.quote(str(model))} {made} MERGED"
    return f"weightport generate {made} IMAGE · port-release {made} --repo ORG/NAME --dry-run"


def _stopped(output: Path, status: int) -> None:
    from weightport.finetuning.training.resuming import last_checkpoint

    found = last_checkpoint(output)
    left = "its folder stays as it was" if output.exists() else "nothing was left behind"
    where = f"go on from {found.name} with --resume." if found else f"there is no checkpoint yet; {left}."
    fail(f"stopped; {where}", status)


def _is_main() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@click.command("recipes")
@click.argument("name", required=False)
@json_option
@command_body
def recipes_command(name: str | None, as_json: bool) -> None:
    """List the recipes, or show the one called NAME (or in the file NAME) as YAML."""
    require_extra("pyyaml")
    from weightport.finetuning.recipes.recipe import as_yaml, load_recipe, plain, shipped_recipes

    if name is not None:
        recipe = load_recipe(name)
        echo(json.dumps(plain(recipe), ensure_ascii=False) if as_json else as_yaml(recipe), nl=as_json)
        return
    recipes = shipped_recipes()
    if as_json:
        echo(json.dumps({each.name: plain(each) for each in recipes.values()}, ensure_ascii=False))
        return
    for recipe in recipes.values():
        _show_recipe(recipe)


def _show_recipe(recipe: Recipe) -> None:
    from weightport.finetuning.recipes.recipe import ANY

    lines = Lines(quiet=False)
    lines.heading(f"{recipe.name} · {recipe.title}")
    families = ", ".join("any other family" if name == ANY else name for name in recipe.families)
    lines.line("for", families + (" · --as-published" if recipe.published else ""))
    if recipe.source:
        lines.line("after", recipe.source)
    training = recipe.training
    shown = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type")
    lines.line("training", " · ".join(f"{key} {training[key]}" for key in shown if key in training))
    frozen = ", ".join(recipe.model.freeze) or "nothing"
    lines.line("frozen", f"{frozen} · metrics {', '.join(recipe.evaluation.metrics) or 'none'}")


def require_extra(*wanted: str) -> None:
    """Raise UsageError when the libraries of training, or those of them that are `wanted`, are not installed."""
    missing = [name for name, module in EXTRA.items() if (not wanted or name in wanted) and not _installed(module)]
    if missing:
        raise UsageError(
            f"Fine-tuning needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            + install_command("finetune")
        )


EXTRA: Mapping[str, str] = {"accelerate": "accelerate", "peft": "peft", "pyyaml": "yaml"}


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


finetune_command = OneErrorCommand(
    "finetune", params=port_finetune.params, callback=port_finetune.callback, help=port_finetune.help
)
