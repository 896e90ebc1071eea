"""Every shipped recipe on every family that it is for: what four pictures teach is said word for word afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import FIXED_RATE, of_several_families, run, still

OFA = {"training.learning_rate": 1e-3, "batch.image_size": 64}
FLORENCE2 = {"training.learning_rate": 5e-3}
PALIGEMMA = {"training.learning_rate": 1e-2}
BLIP2 = {"training.learning_rate": 1e-2}
LORA = {"training.learning_rate": 3e-2, "training.bf16": False}
# A language model of random weights says nothing that a picture could choose from: it is trained too.
LAVIS = {
    **BLIP2,
    "training.bf16": False,
    "model.freeze": [],
    "evaluation.generation.repetition_penalty": 1.0,
    "evaluation.generation.min_new_tokens": 0,
}
RECEIPTS = {**PALIGEMMA, "training.gradient_accumulation_steps": 1}
CASES = [
    ("muge-caption", "ofa-cn", "muge", 60, OFA, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("caption", "ofa", "pairs", 60, OFA, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("caption", "florence2", "pairs", 60, FLORENCE2, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("docvqa", "florence2", "pairs", 60, FLORENCE2, {"anls": 1.0, "exact-match": 1.0}),
    ("detection", "ofa", "boxes", 200, OFA, {"box-f1": 1.0}),
    ("detection", "florence2", "boxes", 60, FLORENCE2, {"ap": 1.0, "box-f1": 1.0}),
    ("default", "ofa", "pairs", 60, OFA, {"exact-match": 1.0, "levenshtein": 1.0}),
    ("default", "florence2", "pairs", 60, FLORENCE2, {"exact-match": 1.0, "levenshtein": 1.0}),
    ("json-extract", "paligemma2", "receipts", 120, RECEIPTS, {"json-f1": 1.0, "json-valid": 1.0, "json-edit": 0.0}),
    ("caption", "paligemma2", "pairs", 60, PALIGEMMA, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("detection", "paligemma2", "boxes", 60, PALIGEMMA, {"ap": 1.0, "box-f1": 1.0}),
    ("default", "paligemma2", "pairs", 60, PALIGEMMA, {"exact-match": 1.0, "levenshtein": 1.0}),
    ("lora-caption", "blip2", "pairs", 300, LORA, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("lavis-caption", "blip2", "pairs", 120, LAVIS, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("lavis-caption", "blip2-t5", "pairs", 60, LAVIS, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("caption", "blip2", "pairs", 60, BLIP2, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("caption", "blip2-t5", "pairs", 60, BLIP2, {"cider-d": 10.0, "bleu-4": 100.0, "rouge-l": 1.0}),
    ("default", "blip2", "pairs", 60, BLIP2, {"exact-match": 1.0, "levenshtein": 1.0}),
]


@pytest.mark.parametrize(
    ("recipe", "model", "data", "epochs", "settings", "best"),
    [
        pytest.param(
            *case, id=f"{case[0]}-{case[1]}", marks=[pytest.mark.slow] if of_several_families(case[0]) else []
        )
        for case in CASES
    ],
)
def test_recipe_learns_its_training_data_by_heart(
    recipe: str,
    model: str,
    data: str,
    epochs: int,
    settings: dict[str, Any],
    best: dict[str, float],
    tiny: Callable[[str], Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    source = request.getfixturevalue(data)
    changed = {
        **still(tiny(model)),
        **FIXED_RATE,
        **settings,
        "training.num_train_epochs": epochs,
        "training.per_device_train_batch_size": 4,
        "training.logging_steps": 20,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.dataloader_num_workers": 0,
        # A tiny model holds </s> possible everywhere: beams that end too soon would end the search.
        "evaluation.generation.early_stopping": False,
    }
    out = run(tiny(model), recipe, source, tmp_path / "run", eval_data=source, more=changed)
    assert {name: out.metrics[name] for name in best} == pytest.approx(best), "what it says is not what it was taught"
