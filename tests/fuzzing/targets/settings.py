"""Recipes, settings on the command line, and reference files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from fuzzing import mutation
from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.same import require_tensor
from fuzzing.targets.changes import change
from weightport.finetuning import recipes
from weightport.finetuning.recipes.recipe import as_yaml, parse_assignments, parse_recipe, with_settings
from weightport.parity.reference import Reference, read_reference, write_reference


def _recipe_seeds(folder: Path) -> list[Case]:
    shipped = sorted(Path(recipes.__file__).parent.glob("*.yaml"))
    return [{"in.yaml": path.read_bytes()} for path in shipped]


def _read_recipe(folder: Path) -> Any:
    from weightport.finetuning.recipes.recipe import load_recipe

    return load_recipe(str(folder / "in.yaml"))


def _as_written(folder: Path, recipe: Any) -> bool:
    """A recipe that is written and read again is the same."""
    again = parse_recipe(as_yaml(recipe), "again")
    if as_yaml(again) != as_yaml(recipe):
        raise MismatchError("recipe: written and read again it is another")
    return True


ASSIGNMENTS = b"""training.learning_rate=1e-5
batch.image_size=64
data.classes=[a, b]
lora.r=8
evaluation.generation={num_beams: 2}
model.freeze=vision
training.bf16=false
"""


def _assign(folder: Path) -> Any:
    lines = (folder / "in.txt").read_bytes().decode("utf-8", "replace").split("\n")
    recipe = parse_recipe("name: x\ntitle: y\nfamilies: [ofa]", "x")
    return with_settings(recipe, parse_assignments([line for line in lines if line]), "--set")


def _reference_seeds(folder: Path) -> list[Case]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "caption/in/pixel_values": torch.zeros(1, 3, 2, 2),
        "caption/out/logits": torch.ones(1, 2, 4),
        "caption/out/logits@float64": torch.ones(1, 2, 4, dtype=torch.float64),
        "beam/in/input_ids": torch.arange(3),
        "beam/out/sequences": torch.arange(4),
    }
    runs: dict[str, dict[str, Any]] = {
        "caption": {"kind": "forward", "options": {"x": 1}},
        "beam": {"kind": "generate", "options": {"num_beams": 2}},
    }
    path = write_reference(folder / "r.safetensors", "ofa", {"project": "p", "commit": "c"}, runs, tensors)
    plain = path.read_bytes()
    document = {
        "format": 1, "family": "ofa", "source": {},
        "runs": {"a": {"kind": "forward", "slices": {"out/logits": [[0, 1], [0, 2], [0, None, 61]]}}},
    }  # fmt: skip
    content = {"a/in/x": torch.zeros(2), "a/out/logits": torch.ones(1, 2, 4)}
    sliced = safetensors.torch.save(content, {"weightport.reference": json.dumps(document)})
    return [{"r.safetensors": plain}, {"r.safetensors": sliced}]


def _reference_change(rng: Random, case: Case, corpus: list[Case]) -> Case:
    """Mostly the document in the metadata, which is JSON in JSON."""
    data = case["r.safetensors"]
    if rng.random() < 0.3 or len(data) < 10:
        return change(rng, case, corpus)
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        text = header["__metadata__"]["weightport.reference"]
        header["__metadata__"]["weightport.reference"] = mutation.of_json(rng, text.encode()).decode(
            "utf-8", "replace"
        )
        made = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return change(rng, case, corpus)
    return {"r.safetensors": len(made).to_bytes(8, "little") + made + data[8 + length :]}


def _read_reference(folder: Path) -> Reference:
    found = read_reference(folder / "r.safetensors")
    for run in found.runs:
        for expected in run.outputs:
            str(expected.selection)
    return found


def _as_safetensors(folder: Path, found: Reference) -> bool:
    theirs = safetensors.torch.load((folder / "r.safetensors").read_bytes())
    for run in found.runs:
        for ref in (*run.inputs.values(), *(expected.tensor for expected in run.outputs)):
            require_tensor(ref.name, ref.read(), theirs[ref.name])
    return True


TARGETS = (
    Target("recipe", _recipe_seeds, change, _read_recipe, _as_written, ("finetuning/recipes",)),
    Target(
        "settings", lambda folder: [{"in.txt": ASSIGNMENTS}], change, _assign, _as_written, ("finetuning/recipes",)
    ),
    Target("reference", _reference_seeds, _reference_change, _read_reference, _as_safetensors, ("parity/",)),
)
