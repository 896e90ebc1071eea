"""A family without an encoder: image, prompt and answer in one sequence, by the family of examples/family."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import draw_jsonl, write_lines
from tiny_runs import FIXED_RATE, losses, run

from weightport.checkpoints import open_checkpoint
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.conversion import convert
from weightport.errors import DataError, RecipeError
from weightport.finetuning.data import open_data
from weightport.finetuning.data.collation import FAILURE, INDICES, BadSamples, Collator, Indexed
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.evaluation.answering import answers, chosen, within_budget
from weightport.finetuning.recipes.settings import BatchSettings, EvaluationSettings
from weightport.finetuning.setup.model_loading import load_model, load_processor
from weightport.generation import generate

EXAMPLE = Path(__file__).parents[2] / "examples" / "family"
STEPS = {
    "training.learning_rate": 1e-2,
    "training.max_steps": 3,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    **FIXED_RATE,
}
ROWS = [
    {"image": "0.png", "prefix": "red", "suffix": "a red disk on the blue box"},
    {"image": "1.png", "prefix": "two of the box", "suffix": "two"},
    {"image": "2.png", "prefix": "", "suffix": "blue disk"},
    {"image": "3.png", "prefix": "blue box on", "suffix": "the red box on two of the disk"},
]
"""Prompts and answers of different lengths, in Tellit's words."""


@pytest.fixture(scope="module")
def family() -> Any:
    sys.path.insert(0, str(EXAMPLE))
    from weightport_tellit import FAMILY

    return FAMILY


@pytest.fixture(scope="module")
def tellit(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model directory."""
    out = tmp_path_factory.mktemp("tellit") / "model"
    sources = Sources({MAIN: open_checkpoint(EXAMPLE / "cases" / "tiny" / "tellit.pt")})
    convert(sources, out, family.conversion, family.options())
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(draw_jsonl(tmp_path_factory.mktemp("captions"), len(ROWS)), ROWS)


@pytest.fixture
def loaded(tellit: Path, family: Any) -> tuple[Any, Any]:
    """(model, processor)."""
    from weightport.finetuning.recipes.settings import ModelSettings

    model = load_model(tellit, family.training, ModelSettings()).eval()
    return model, load_processor(tellit, family.training, BatchSettings())


def collated(loaded: tuple[Any, Any], family: Any, data: Path, rows: list[int], **settings: Any) -> dict[str, Any]:
    model, processor = loaded
    samples = open_data(str(data), DataSettings())
    skip = settings.pop("skip", 0)
    batch = BatchSettings(prompt="{prefix}", max_target_length=23, **settings)
    collator = Collator(family.training, processor, model.config, batch, BadSamples(samples, skip))
    return collator([Indexed(samples)[row] for row in rows])


def loss_and_tokens(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
    inputs = {name: value for name, value in batch.items() if name != INDICES}
    with torch.no_grad():
        return model(**inputs).loss, int((inputs["labels"] != -100).sum())


def test_loss_of_a_batch_is_that_of_its_samples_one_by_one(loaded: Any, family: Any, data: Path) -> None:
    model = loaded[0]
    together, tokens = loss_and_tokens(model, collated(loaded, family, data, [0, 1, 2, 3]))
    each = [loss_and_tokens(model, collated(loaded, family, data, [row])) for row in range(4)]
    assert tokens == sum(count for _, count in each)
    assert float(together) == pytest.approx(sum(float(loss) * count for loss, count in each) / tokens, abs=2e-6)


def test_answers_are_the_same_alone_and_behind_padding_and_hold_no_prompt(
    loaded: Any, family: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    samples = open_data(str(data), DataSettings())
    read: list[list[int]] = []
    original = type(family.training).read
    monkeypatch.setattr(
        type(family.training), "read", lambda self, *given: read.append(given[2].tolist()) or original(self, *given)
    )

    def answered(size: int) -> list[list[int]]:
        read.clear()
        settings = EvaluationSettings(batch_size=size, generation={"max_new_tokens": 5, "min_new_tokens": 5})
        found = answers(
            model, processor, family.training, samples, chosen(4, None),
            BatchSettings(prompt="{prefix}", max_prompt_length=9), settings,
        )  # fmt: skip
        assert [each.prompt for each in found] == [row["prefix"] for row in ROWS]
        return list(read)

    alone, together = answered(1), answered(4)
    assert together == alone
    assert [len(ids) for ids in alone] == [5] * 4, "the prompt's tokens are among the answer's"
    assert len({tuple(ids) for ids in alone}) > 1


def test_generate_returns_the_answer_without_the_prompt(tellit: Path, data: Path) -> None:
    prompt = "two of the box"
    answer = generate(tellit, data.parent / "1.png", prompt=prompt, max_new_tokens=4)
    assert 0 < len(answer.ids) <= 4
    assert not answer.text.startswith(prompt)


def test_generation_ends_where_the_positions_end(loaded: Any, family: Any, data: Path) -> None:
    model, processor = loaded
    samples = open_data(str(data), DataSettings())
    settings = EvaluationSettings(generation={"max_new_tokens": 500, "min_new_tokens": 500})
    found = answers(
        model, processor, family.training, samples, [1], BatchSettings(prompt="{prefix}"), settings,
    )  # fmt: skip
    assert found[0].text
    own = model.generation_config
    assert within_budget(own, {"max_length": 500}, 5, 24) == {"max_length": 24}
    assert within_budget(own, {"max_new_tokens": 3}, 5, 24) == {"max_new_tokens": 3, "max_length": None}


def test_sample_beyond_the_budget_of_prompt_and_answer_is_named(loaded: Any, family: Any, data: Path) -> None:
    rows = [*ROWS, {"image": "0.png", "prefix": "red " * 12, "suffix": "blue " * 12}]
    longer = write_lines(data.parent / "longer.jsonl", rows)
    found = collated(loaded, family, longer, [3, 4])
    assert "longer.jsonl, line 5: prompt and answer are 26 tokens together, and the model has 24" in found[FAILURE]
    assert "--skip-bad" in found[FAILURE]
    left = collated(loaded, family, longer, [3, 4], skip=1)
    assert left[INDICES].tolist() == [3]
    assert left["input_ids"].shape == collated(loaded, family, longer, [3])["input_ids"].shape


def test_batch_of_samples_beyond_the_budget_gets_another_sample(loaded: Any, family: Any, data: Path) -> None:
    rows = [{"image": "0.png", "prefix": "red " * 12, "suffix": "blue " * 12}] * 2 + ROWS
    longer = write_lines(data.parent / "longer_first.jsonl", rows)
    found = collated(loaded, family, longer, [0, 1], skip=2)
    assert found[INDICES].tolist() == [2] and found["stand_in"]


def test_run_is_refused_before_its_first_step_when_a_sample_is_beyond_the_budget(
    tellit: Path, family: Any, data: Path, tmp_path: Path
) -> None:
    rows = [{"image": "0.png", "prefix": "red " * 12, "suffix": "blue " * 12}]
    longer = write_lines(data.parent / "only_longer.jsonl", rows)
    with pytest.raises(DataError, match="26 tokens together, and the model has 24 positions"):
        run(tellit, "default", longer, tmp_path / "run", family=family.training, more=STEPS)
    assert not (tmp_path / "run").exists()


def test_accumulated_batches_have_the_losses_of_one(tellit: Path, family: Any, data: Path, tmp_path: Path) -> None:
    seen = []
    for batch, accumulated in ((4, 1), (2, 2)):
        more = {**STEPS, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        out = run(tellit, "default", data, tmp_path / str(batch), family=family.training, more=more)
        seen.append(losses(out.history))
    assert len(seen[0]) == 3
    assert seen[1] == pytest.approx(seen[0], abs=5e-6)


def test_recipe_for_every_family_trains_a_family_of_another_package(
    tellit: Path, family: Any, data: Path, tmp_path: Path
) -> None:
    more = {**STEPS, "training.max_steps": 60, "training.per_device_train_batch_size": 4, "batch.prompt": "{prefix}"}
    more |= {"evaluation.metrics": ["exact-match"], "evaluation.generation.num_beams": 1}
    out = run(tellit, "caption", data, tmp_path / "run", eval_data=data, family=family.training, more=more)
    assert out.metrics["exact-match"] == 1.0
    assert json.loads((out.directory / "config.json").read_text())["model_type"] == "git"
    frozen = json.loads((out.directory / "training.json").read_text())["trainable"]["vision"]
    assert frozen[0] == 0 < frozen[1], "the recipe freezes the image encoder"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch.count_padding": True}, r"batch\.count_padding is for models with an encoder"),
        ({"batch.attend_padding": True}, r"batch\.attend_padding is for models with an encoder"),
        ({"training.label_smoothing_factor": 0.1}, "tellit has no label smoothing"),
        (
            {"model.freeze": ["encoder"]},
            "no freeze target 'encoder'.*vision, projector, embeddings, decoder",
        ),
    ],
)
def test_setting_that_the_family_does_not_have_is_refused(
    settings: dict[str, Any], message: str, tellit: Path, family: Any, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tellit, "default", data, tmp_path / "run", family=family.training, more={**STEPS, **settings})
    assert not (tmp_path / "run").exists()
