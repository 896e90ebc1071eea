"""Runs that go on where they were stopped: the last checkpoint that is whole, and the settings it belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightport.errors import TrainingError
from weightport.finetuning.recipes.recipe import parse_recipe, plain
from weightport.finetuning.recipes.settings import Recipe

RECIPE, CHECKPOINTS, INPUTS = "recipe.yaml", "checkpoints", "inputs.json"
OWN_FILES = (
    f"{CHECKPOINTS}/checkpoint-*",
    f"{CHECKPOINTS}/tmp-checkpoint-*",
    f"{CHECKPOINTS}/final/*",
    f"{CHECKPOINTS}/{INPUTS}",
    "predictions/step-*.jsonl",
    "features/*",
    "tensorboard/*",
    "metrics.json",
    "history.json",
)
"""What a run writes into its folder beside its recipe, its report and its result, which are recorded one by one."""


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder. A checkpoint's trainer_state.json is written last, so that one
    without it was interrupted."""
    found = [
        (step, folder)
        for folder in (run / CHECKPOINTS).glob("checkpoint-*")
        if (step := checkpoint_step(folder)) is not None and _is_whole(folder)
    ]
    return max(found)[1] if found else None


def checkpoint_step(folder: Path) -> int | None:
    """The step that a folder's name says it is a checkpoint of."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def _is_whole(folder: Path) -> bool:
    try:
        return "global_step" in json.loads((folder / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def require_same(run: Path, recipe: Recipe) -> None:
    """Raises TrainingError when the run in the folder `run` was started with other settings."""
    path = run / RECIPE
    if not path.is_file():
        raise TrainingError(f"{run} is not a run that could be resumed: it has no {RECIPE}.")
    before, now = _flat(plain(parse_recipe(path.read_text("utf-8"), str(path)))), _flat(plain(recipe))
    different = [
        f"{key}: {before.get(key, 'not set')} then, {now.get(key, 'not set')} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if different:
        raise TrainingError(
            f"{run} was started with other settings:\n      " + "\n      ".join(different[:12]) + "\n"
            f"  Resume with the same (--recipe {path}), or start another run."
        )


def write_inputs(run: Path, inputs: Mapping[str, Any]) -> None:
    """Keep what a run is trained on, for `changed_inputs`."""
    path = run / CHECKPOINTS / INPUTS
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(inputs, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def changed_inputs(run: Path, inputs: Mapping[str, Any]) -> list[str]:
    """Notes on what is elsewhere now than when the run was started: data and models may have been moved. Raises
    TrainingError when the data have another number of samples, whose order would be another, or say other things."""
    try:
        before = json.loads((run / CHECKPOINTS / INPUTS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{run} cannot be resumed: {run / CHECKPOINTS / INPUTS} is not whole: {error}.") from error
    if before["samples"] != inputs["samples"]:
        raise TrainingError(
            f"{run} was started on {before['samples']:,} samples ({before['data']}), and there are "
            f"{inputs['samples']:,} now ({inputs['data']}). Resume with the same data, or start another run."
        )
    # Records of earlier versions do not say what the data held.
    if before.get("content", inputs["content"]) != inputs["content"]:
        raise TrainingError(
            f"{run} was started on {before['data']} as it was then, and {inputs['data']} holds other questions, "
            "answers or pictures now: their fingerprints differ. Resume with the same data, or start another run."
        )
    notes = [
        f"the run was started with {name} {before[name]}, and goes on with {inputs[name]}"
        for name in ("model", "data", "eval_data")
        if name in before and before[name] != inputs[name]
    ]
    if before.get("eval_content") and inputs["eval_content"] and before["eval_content"] != inputs["eval_content"]:
        notes.append("the evaluation data are not those that the run was started with: earlier figures do not compare")
    return notes


def recorded_division(run: Path) -> dict[str, int] | None:
    """How a step's samples were divided when the run was started (see `setup.batch_size.Division`); None where the run
    does not say."""
    try:
        found = json.loads((run / CHECKPOINTS / INPUTS).read_text("utf-8")).get("step")
        return {name: int(found[name]) for name in ("size", "accumulation", "processes")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, each in value.items():
        flat |= _flat(each, f"{prefix}{key}.") if isinstance(each, Mapping) else {f"{prefix}{key}": each}
    return flat
