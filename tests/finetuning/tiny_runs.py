"""Runs of every recipe at tiny size: the golden cases' models, converted, on pictures and texts drawn here."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from weightport.api import convert
from weightport.families.registry import registry
from weightport.finetuning.family import Family
from weightport.finetuning.recipes.recipe import load_recipe, qualified, with_settings
from weightport.finetuning.setup.preparing import Job, resolved
from weightport.finetuning.training.results import Outcome
from weightport.finetuning.training.run import finetune

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = {
    "ofa-cn": "ofa/cn-tiny",
    "ofa": "ofa/en-tiny-args",
    "florence2": "florence2/tiny-vocab-4k",
    "paligemma2": "paligemma2/tiny-gemma2",
    "blip2": "blip2/opt-tiny",
    "blip2-t5": "blip2/t5-coco-tiny",
    "moondream2": "moondream2/tiny-2024-04-02",
    "moondream2-crops": "moondream2/tiny-2024-08-26",
    "moondream2-tiles": "moondream2/tiny-2025-06-21",
}
"""Golden cases by what they are called here; all have a vocabulary of their own."""

CAPTIONS = ("red cat on mat", "big dog in sun", "old hat by bed", "hot tea for two")
CHINESE_CAPTIONS = ("图片描述", "述了什么", "么内容这", "片述么这")
"""Characters that cn-tiny's vocabulary has."""

PLAIN_SEARCH = {
    "training.bf16": False,
    "evaluation.generation.num_beams": 1,
    "evaluation.generation.min_new_tokens": 0,
    "evaluation.generation.repetition_penalty": 1.0,
}
"""Of a model that has learned nothing: no beams that the last bits decide between, and no least length."""

RECIPES = {
    "muge-caption-ofa-cn": ("muge-caption", "ofa-cn", "muge", {"batch.image_size": 64}),
    "caption-ofa": ("caption", "ofa", "pairs", {"batch.image_size": 64}),
    "caption-florence2": ("caption", "florence2", "pairs", {}),
    "docvqa-florence2": ("docvqa", "florence2", "pairs", {}),
    "detection-ofa": ("detection", "ofa", "boxes", {"batch.image_size": 64}),
    "detection-florence2": ("detection", "florence2", "boxes", {}),
    "default-ofa": ("default", "ofa", "pairs", {"batch.image_size": 64}),
    "default-florence2": ("default", "florence2", "pairs", {}),
    "json-extract-paligemma2": ("json-extract", "paligemma2", "receipts", {"training.gradient_accumulation_steps": 1}),
    "caption-paligemma2": ("caption", "paligemma2", "pairs", {}),
    "detection-paligemma2": ("detection", "paligemma2", "boxes", {}),
    "default-paligemma2": ("default", "paligemma2", "pairs", {}),
    "lora-caption-blip2": ("lora-caption", "blip2", "pairs", {"lora.lora_dropout": 0.0, "training.bf16": False}),
    "lavis-caption-blip2": ("lavis-caption", "blip2", "pairs", PLAIN_SEARCH),
    "lavis-caption-blip2-t5": ("lavis-caption", "blip2-t5", "pairs", PLAIN_SEARCH),
    "caption-blip2": ("caption", "blip2", "pairs", {}),
    "caption-blip2-t5": ("caption", "blip2-t5", "pairs", {}),
    "default-blip2": ("default", "blip2", "pairs", {}),
    "count-json-moondream2": ("count-json", "moondream2", "boxes", {}),
    "default-moondream2": ("default", "moondream2", "pairs", {}),
}
"""Every shipped recipe on every family that it is for: its name, the model, the fixture of its data, tiny settings."""


def of_several_families(recipe: str) -> bool:
    """Whether a recipe is no family's own: the engine is then the same as in that family's, and `--slow` runs it."""
    return recipe in ("caption", "default")


EVERY_RECIPE = [
    pytest.param(name, marks=[pytest.mark.slow] if of_several_families(case[0]) else [])
    for name, case in RECIPES.items()
]

STILL = {
    "ofa": ("dropout", "encoder_drop_path_rate", "decoder_drop_path_rate"),
    "florence2": (
        "text_config.dropout",
        "text_config.attention_dropout",
        "text_config.activation_dropout",
        "vision_config.drop_path_rate",
    ),
    "paligemma": ("text_config.attention_dropout", "vision_config.attention_dropout"),
    "blip-2": (
        "text_config.dropout",
        "text_config.attention_dropout",
        "qformer_config.hidden_dropout_prob",
        "qformer_config.attention_probs_dropout_prob",
    ),
    "blip-2 t5": (
        "text_config.dropout_rate",
        "qformer_config.hidden_dropout_prob",
        "qformer_config.attention_probs_dropout_prob",
    ),
    "moondream": ("text_config.attention_dropout", "vision_config.attention_dropout"),
}
"""Fields of the config that make training random."""

FOUR_STEPS = {
    "training.learning_rate": 1e-3,
    "training.warmup_steps": 0,
    "training.max_steps": 4,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.save_total_limit": None,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    "evaluation.samples": 3,
    "evaluation.batch_size": 1,
    "evaluation.generation.max_new_tokens": 3,
}
"""A run of four steps with a checkpoint every second one, in one process of data."""
FIXED_RATE = {"training.warmup_steps": 0, "training.lr_scheduler_type": "constant"}
"""What a few steps on four pictures need in place of a guide's schedule."""


def boxes_document() -> dict[str, Any]:
    """COCO annotations of four pictures of 48 by 32 pixels; the boxes are as coarse as a tiny model's bins."""
    cat, dog = (1, (0, 0, 20, 26)), (2, (20, 6, 28, 26))
    places = [[cat], [dog], [cat, dog], [dog, cat]]
    annotations = [
        {"image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0}
        for image, found in enumerate(places)
        for category, box in found
    ]
    return {
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in range(len(places))],
        "annotations": [{"id": number, **each} for number, each in enumerate(annotations)],
    }


def convert_case(name: str, folder: Path) -> Path:
    """The model directory of a golden case, as `port-<family>` writes it."""
    sys.path.insert(0, str(GOLDEN))
    from golden_case import Case, sources_of
    from needs import FAMILIES

    case = Case(GOLDEN / "cases" / MODELS.get(name, name), name)
    (folder / "original").mkdir()
    checkpoint = case.materialize(folder / "original")
    table = FAMILIES[case.family]
    convert(sources_of(case, table, checkpoint), folder / name, case.family, **table.settings(case))
    return folder / name


def still(model: Path) -> dict[str, Any]:
    """Settings without which no two runs of different shape give the same losses: no dropout anywhere."""
    config = json.loads((model / "config.json").read_text())
    family = config["model_type"]
    of_kind = f"{family} {config.get('text_config', {}).get('model_type')}"
    return {f"model.config.{name}": 0.0 for name in STILL.get(of_kind, STILL[family])}


def job_of(
    model: Path,
    recipe: str | Path,
    data: Path | str,
    output: Path,
    *,
    eval_data: Path | str | None = None,
    as_published: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    family: Family | None = None,
    **settings: Any,
) -> Job:
    """A job as the command line makes it; `settings` by name, `__` for the dot of a dotted one. `family`: of a model
    whose family is not installed."""
    family = family or registry().training_of(model)
    found, mistakes = resolved(load_recipe(str(recipe)), family.name, as_published=as_published)
    assigned = {key.replace("__", "."): value for key, value in settings.items()}
    assigned |= assigned.pop("more", {})
    return Job(
        model=model,
        family=family,
        data=str(data),
        output=output,
        recipe=with_settings(found, assigned, "--set"),
        eval_data=None if eval_data is None else str(eval_data),
        resume=resume,
        overwrite=overwrite,
        explicit=frozenset(qualified(key, "--set") for key in assigned),
        mistakes=mistakes,
    )


def run(*args: Any, **settings: Any) -> Outcome:
    """`job_of`, run in this process without a word."""
    return finetune(job_of(*args, **settings), quiet=True)


def trained_model(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets the model of each run to come, as it was when its last step was done, copied."""
    from weightport.finetuning.training import run as module

    found: list[Any] = []
    finish = module.finish

    def keep(job: Any, prepared: Any, trainer: Any, *args: Any) -> Outcome:
        found.append(copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)))
        return finish(job, prepared, trainer, *args)

    monkeypatch.setattr(module, "finish", keep)
    return found


def losses(history: list[dict[str, Any]] | Path) -> dict[int, float]:
    """Logged training loss by step, of a run's history or of a run's folder."""
    if isinstance(history, Path):
        history = json.loads((history / "history.json").read_text())
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def assigned(settings: Mapping[str, Any]) -> list[str]:
    """The settings as the command line takes them."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
