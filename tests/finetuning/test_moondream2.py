"""moondream2's sequences and the recipe count-json: what the project's notebook trains on, and what the guide says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import draw_coco
from PIL import Image
from tiny_runs import FIXED_RATE, GOLDEN, MODELS, losses, run
from transformers import AutoModelForImageTextToText, AutoProcessor

from weightport.checkpoints import open_checkpoint
from weightport.errors import DataError, RecipeError
from weightport.families.moondream2.training import TRAINING
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.recipes.recipe import for_family, load_recipe
from weightport.finetuning.recipes.settings import BatchSettings
from weightport.finetuning.setup.freezing import frozen_parts, shares
from weightport.finetuning.training.schedules import own_schedule

SHORT = {
    "training.learning_rate": 1e-2,
    "training.per_device_train_batch_size": 4,
    "training.max_steps": 3,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.dataloader_num_workers": 0,
    **FIXED_RATE,
}
PICTURE = Image.new("RGB", (60, 40), "red")


@pytest.fixture
def case() -> Any:
    sys.path.insert(0, str(GOLDEN))
    from golden_case import Case

    return Case(GOLDEN / "cases" / MODELS["moondream2"], "tiny-2024-04-02")


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny("moondream2"), dtype=torch.float32).eval()


@pytest.fixture
def processor(tiny: Callable[[str], Path]) -> Any:
    return AutoProcessor.from_pretrained(tiny("moondream2"))


def encoded(processor: Any, case: Any) -> dict[str, torch.Tensor]:
    """The golden case's pictures, questions and answers."""
    stated = case.spec["reference"]
    pictures = [Image.fromarray(case.tensors[f"image.{row}"].numpy()) for row in range(len(stated["prompts"]))]
    prompts = [processor.prompt("query", question) for question in stated["prompts"]]
    return TRAINING.encode(processor, None, BatchSettings(), prompts, stated["answers"], pictures)


def test_texts_become_the_sequences_that_the_original_trains_on(processor: Any, case: Any) -> None:
    made = encoded(processor, case)
    places = made["input_ids"] == processor.image_token_id
    assert bool((places.sum(1) == processor.image_processor.image_seq_length).all())
    tokens = torch.stack([ids[~image] for ids, image in zip(made["input_ids"], places)])
    assert torch.equal(tokens, case.tensors["train.tokens"])
    assert torch.equal(made["labels"], case.tensors["train.labels"])
    assert torch.equal(made["attention_mask"].bool(), case.tensors["train.attention_mask"])


@pytest.mark.pillow13
def test_pictures_and_texts_give_the_loss_of_the_original(model: Any, processor: Any, case: Any) -> None:
    with torch.no_grad():
        loss = model(**encoded(processor, case)).loss
    assert float(loss) == pytest.approx(float(case.tensors["train.loss"]), abs=5e-6)


@pytest.mark.pillow13
def test_questions_are_what_the_original_generates_from(model: Any, processor: Any, case: Any) -> None:
    stated = case.spec["reference"]
    pictures = [Image.fromarray(case.tensors[f"image.{row}"].numpy()) for row in range(len(stated["prompts"]))]
    prompts = [TRAINING.prompt(processor, BatchSettings(task="vqa"), sample_of(text)) for text in stated["prompts"]]
    asked = TRAINING.questions(processor, BatchSettings(), prompts, pictures)
    ids = model.generate(**asked, max_new_tokens=stated["generation"]["max_new_tokens"])
    answers = [TRAINING.read(processor, BatchSettings(), row[asked["input_ids"].shape[1] :], None).text for row in ids]
    assert answers == [text.strip() for text in stated["strings"]["greedy"]]


def sample_of(question: str) -> Sample:
    return Sample("here", None, question, "", ())


def test_question_that_spells_out_the_image_token_is_text(model: Any, processor: Any) -> None:
    prompt = TRAINING.prompt(processor, BatchSettings(prompt="{prefix}"), sample_of("what is <image>?"))
    made = TRAINING.encode(processor, None, BatchSettings(), [prompt], ["it is <image>"], [PICTURE])
    assert int((made["input_ids"] == processor.image_token_id).sum()) == processor.image_processor.image_seq_length
    kept = made["input_ids"][0][made["input_ids"][0] != processor.image_token_id]
    assert processor.tokenizer.decode(kept) == (
        "<|endoftext|>\n\nQuestion: what is <image>?\n\nAnswer: it is <image><|endoftext|>"
    )
    assert torch.isfinite(model(**made).loss)


def test_room_is_what_the_positions_leave(processor: Any, model: Any) -> None:
    room = TRAINING.room(processor, model.config)
    empty = TRAINING.encode(processor, None, BatchSettings(), [processor.prompt("query", "")], [""], [PICTURE])
    assert room.total == 2048 and empty["input_ids"].shape[1] <= room.total - room.answer + 2
    assert room.prompt < room.answer < room.total


def test_sample_without_a_picture_and_boxes_are_refused(processor: Any) -> None:
    with pytest.raises(DataError, match="a sample has none"):
        TRAINING.questions(processor, BatchSettings(), ["a", "b"], [PICTURE, None])
    boxes = Sample("photo 3", None, "", "", (), Objects(("cat",), ((0.0, 0.0, 4.0, 4.0),), (8, 8)))
    with pytest.raises(DataError, match="photo 3: boxes are no text that moondream2 writes"):
        TRAINING.answer(processor, BatchSettings(), boxes)
    with pytest.raises(RecipeError, match="no task 'dance'"):
        TRAINING.prompt(processor, BatchSettings(task="dance"), sample_of(""))


def test_every_parameter_belongs_to_a_part(model: Any) -> None:
    assert {TRAINING.parts.part_of(name) for name, _ in model.named_parameters()} == {
        "vision", "projector", "embeddings", "decoder", "head",
    }  # fmt: skip


def test_recipe_trains_what_the_notebook_trains(model: Any) -> None:
    recipe = for_family(load_recipe("count-json"), "moondream2")
    wanted = {
        "num_train_epochs": 1, "per_device_train_batch_size": 24, "gradient_accumulation_steps": 1,
        "learning_rate": 3e-5, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "bf16": True,
    }  # fmt: skip
    assert {name: recipe.training[name] for name in wanted} == wanted
    frozen = frozen_parts(TRAINING.parts, recipe.model.freeze)
    assert {share.part for share in shares(model, TRAINING.parts)} - frozen == {"embeddings", "decoder", "head"}


def notebook_rates(steps: int, end: float) -> list[float]:
    """Rates of the notebook's optimizer steps: it begins at a tenth, and sets the next step's rate after each one. Its
    cosine's argument ends at 0.9 π; with `end` at 1.0 it reaches π."""
    rates = [0.1 * 3e-5]
    for done in range(1, steps):
        x = done / steps
        if x < 0.1:
            rates.append(0.1 * 3e-5 + 0.9 * 3e-5 * x / 0.1)
        else:
            rates.append(0.1 * 3e-5 + 0.9 * 3e-5 * (1 + math.cos(math.pi * (x - 0.1) * end / 0.9)) / 2)
    return rates


@pytest.mark.parametrize("steps", [1, 7, 25, 1000])
@pytest.mark.parametrize(("published", "end", "last"), [(False, 1.0, 0.1), (True, 0.9, 0.122)])
def test_rate_of_every_step_is_the_notebooks(steps: int, published: bool, end: float, last: float) -> None:
    training = for_family(load_recipe("count-json"), "moondream2", as_published=published).training
    schedule = own_schedule(training)
    assert schedule is not None
    share = schedule.over(steps, training["warmup_steps"])
    found = [3e-5 * share(step) for step in range(steps)]
    assert found == pytest.approx(notebook_rates(steps, end), rel=1e-12)
    assert share(steps) == pytest.approx(last, rel=3e-3)


def test_rates_of_a_run_are_those_of_the_schedule(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    schedule = ("lr_scheduler_type", "warmup_steps")
    more = {name: value for name, value in SHORT.items() if not name.endswith(schedule)}
    settings = {**more, "training.max_steps": 12, "training.learning_rate": 3e-5, "training.logging_steps": 1}
    out = run(tiny("moondream2"), "count-json", coins(tmp_path / "coins"), tmp_path / "run", more=settings)
    # What Trainer logs at a step is the rate that it was taken with.
    found = [each["learning_rate"] for each in out.history if "learning_rate" in each]
    assert found == pytest.approx(notebook_rates(12, 1.0), rel=1e-9)


def coins(folder: Path) -> Path:
    """COCO annotations of four pictures with other counts each."""
    counts = [{"dime": 1, "penny": 2}, {"penny": 1}, {"dime": 2}, {"dime": 1, "penny": 1}]
    names = {"dime": 1, "penny": 2}
    annotations = [
        {"image_id": image, "category_id": names[name], "bbox": [4.0 * n, 4.0, 4.0, 4.0], "iscrowd": 0}
        for image, found in enumerate(counts)
        for name, count in found.items()
        for n in range(count)
    ]
    return draw_coco(folder, {
        "categories": [{"id": place, "name": name} for name, place in names.items()],
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in range(len(counts))],
        "annotations": [{"id": number, **each} for number, each in enumerate(annotations)],
    })  # fmt: skip


def test_drawn_coins_are_counted_and_the_frozen_tower_stays(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = coins(tmp_path / "coins")
    more = {**SHORT, "training.max_steps": 150, "training.learning_rate": 5e-3, "training.logging_steps": 50}
    base = tiny("moondream2")
    out = run(base, "count-json", data, tmp_path / "run", eval_data=data, more=more)
    assert out.metrics["exact-match-json"] == 1.0 and out.metrics["count-error"] == 0.0
    before, after = open_checkpoint(base), open_checkpoint(out.directory)
    for name in before:
        frozen = name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
        assert torch.equal(before[name].read(), after[name].read()) == frozen, name


def test_cached_image_vectors_give_the_losses_of_a_run_without(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = coins(tmp_path / "coins")
    seen = [
        losses(run(tiny("moondream2"), "count-json", data, tmp_path / str(cached), more={
            **SHORT, "training.logging_steps": 1, "model.cache_features": cached}).history)
        for cached in (False, True)
    ]  # fmt: skip
    assert len(seen[0]) == 3 and seen[1] == pytest.approx(seen[0], rel=1e-6)


def test_run_as_published_says_what_the_guide_does_wrong(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = coins(tmp_path / "coins")
    more = {name: value for name, value in SHORT.items() if "lr_scheduler" not in name and "warmup" not in name}
    out = run(tiny("moondream2"), "count-json", data, tmp_path / "run", as_published=True, more=more)
    assert json.loads((out.directory / "training.json").read_text())["as_published"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "0.122" in report and "never divides the loss by GRAD_ACCUM_STEPS" in report


def test_accumulated_steps_are_divided_unless_as_published(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """SGD on the sum of two batches' means moves twice as far as on their mean."""
    data, base = coins(tmp_path / "coins"), tiny("moondream2")
    more = {
        **SHORT, "training.max_steps": 1, "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 2, "training.optim": "sgd", "training.learning_rate": 1.0,
        "training.logging_steps": 1,
    }  # fmt: skip
    moved, seen = [], []
    for published in (False, True):
        out = run(base, "count-json", data, tmp_path / str(published), as_published=published, more=more)
        name = "lm_head.bias"
        change = open_checkpoint(out.directory)[name].read().double() - open_checkpoint(base)[name].read().double()
        moved.append(change)
        seen.append(losses(out.history)[1])
    ratio = float((moved[0] * moved[1]).sum() / (moved[0] ** 2).sum())
    # Means of batches and of tokens weigh answers of other lengths differently.
    assert ratio == pytest.approx(2, rel=0.05) and seen[1] == pytest.approx(2 * seen[0], rel=0.05)


@pytest.mark.parametrize("name", ["moondream2-crops", "moondream2-tiles"])
def test_pictures_of_several_views_are_trained_on_and_their_region_head_stays(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    data, base = coins(tmp_path / "coins"), tiny(name)
    settings = {**SHORT, "training.logging_steps": 1}
    plain = run(base, "count-json", data, tmp_path / "plain", more=settings)
    cached = run(base, "count-json", data, tmp_path / "cached", more={**settings, "model.cache_features": True})
    found = losses(plain.history)
    assert len(found) == 3 and found[3] < found[1]
    assert losses(cached.history) == pytest.approx(found, rel=1e-5)
    before, after = open_checkpoint(base), open_checkpoint(plain.directory)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name].read(), after[name].read())}
    assert changed == {"model", "lm_head"} and any(name.startswith("region_head.") for name in before)
