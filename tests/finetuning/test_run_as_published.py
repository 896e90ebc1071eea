"""`--as-published` computes the guides' losses, restated here from their description; the default the right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import RECIPES, assigned, job_of, losses, run, still

from weightport import cli
from weightport.errors import RecipeError
from weightport.finetuning.data.collation import INDICES, BadSamples, Collator, Indexed
from weightport.finetuning.recipes.recipe import shipped_recipes
from weightport.finetuning.setup.preparing import prepare

PAD = 1
GUIDES = ["muge-caption-ofa-cn", "docvqa-florence2"]
STEPS = {
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 4,
    "training.max_steps": 1,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}


@pytest.fixture(scope="module")
def uneven_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MUGE's files with captions of different length, so that there is padding to count."""
    import json

    from drawn_data import draw_muge, write_lines

    path = draw_muge(tmp_path_factory.mktemp("uneven-muge"), count=4, captions=1)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return write_lines(
        path, [{**row, "text": [text]} for row, text in zip(rows, ["图", "述了什么", "么内", "片述么这内容"])]
    )


@pytest.fixture(scope="module")
def uneven_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers of different length, so that there is padding to count and to attend to."""
    import json

    from drawn_data import draw_jsonl, write_lines

    path = draw_jsonl(tmp_path_factory.mktemp("uneven-docvqa"), 4)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    asked = ["what?", "what is the colour of it?", "and this?", "what is seen on the left?"]
    said = ["red", "green and a bit of white", "b", "a big orange square"]
    return write_lines(path, [{**row, "prefix": q, "suffix": a} for row, q, a in zip(rows, asked, said)])


def source_of(name: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("uneven_captions" if name.startswith("muge") else "uneven_questions")


def first_batch(prepared: Any) -> dict[str, Any]:
    """All four samples, as the trainer gets them."""
    loaded, samples = prepared.loaded, prepared.samples
    collator = Collator(
        loaded.family, loaded.processor, loaded.model.config, prepared.recipe.batch, BadSamples(samples, 0)
    )
    indexed = Indexed(samples)
    return collator([indexed[index] for index in range(4)])


def logits_of(prepared: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in (INDICES, "labels")}
    with torch.no_grad():
        return prepared.loaded.model.eval()(**inputs).logits


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("as_published", [True, False], ids=["as-published", "default"])
def test_loss_is_the_guides_or_the_right_one(
    name: str, as_published: bool, tiny: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, model, _, settings = RECIPES[name]
    more = {**STEPS, **settings, **still(tiny(model))}
    source = source_of(name, request)
    job = job_of(tiny(model), recipe, source, tmp_path / "run", as_published=as_published, more=more)
    prepared = prepare(job)
    batch = first_batch(prepared)
    answers = prepared.loaded.processor.tokenizer([prepared.samples[i].suffix for i in range(4)], padding=True)
    said = torch.tensor(answers["input_ids"])
    assert (said == PAD).any(), "there is no padding, so that nothing could be told apart"

    logits = logits_of(prepared, batch)
    # Florence-2 is taught <s> too; OFA's answer begins behind it.
    target = said if model == "florence2" else torch.cat([said[:, 1:], torch.full_like(said[:, :1], PAD)], dim=1)
    target = target[:, : logits.shape[1]]
    per_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    real = (target != PAD).flatten()
    want = per_token.mean() if as_published else per_token[real].mean()
    assert abs(float(per_token.mean() - per_token[real].mean())) > 1e-3, "both losses are the same here"

    out = run(
        tiny(model), recipe, source, tmp_path / "run", as_published=as_published,
        more={**more, "training.learning_rate": 0.0},
    )  # fmt: skip
    assert losses(out.history)[1] == pytest.approx(float(want), rel=2e-5)


def test_padding_of_questions_is_attended_to_as_the_remote_code_does_and_only_there(
    tiny: Callable[[str], Path], uneven_questions: Path, tmp_path: Path
) -> None:
    seen = {}
    for as_published in (True, False):
        job = job_of(tiny("florence2"), "docvqa", uneven_questions, tmp_path / "run", as_published=as_published)
        seen[as_published] = first_batch(prepare(job))
    assert seen[True]["attention_mask"].min() == 1
    assert seen[False]["attention_mask"].min() == 0
    assert torch.equal(seen[True]["input_ids"], seen[False]["input_ids"])
    assert (seen[False]["labels"] == -100).any() and not (seen[True]["labels"] == -100).any()
    assert torch.equal(seen[True]["decoder_input_ids"], seen[False]["decoder_input_ids"])


def test_tower_that_the_guide_calls_frozen_is_trained_as_published_and_frozen_by_default(
    tiny: Callable[[str], Path], uneven_questions: Path, tmp_path: Path
) -> None:
    for as_published in (True, False):
        job = job_of(tiny("florence2"), "docvqa", uneven_questions, tmp_path / "run", as_published=as_published)
        vision = next(share for share in prepare(job).shares if share.part == "vision")
        assert (vision.trainable == vision.total) is as_published


def test_locked_encoder_keeps_its_dropout_as_published_only(
    tiny: Callable[[str], Path], uneven_captions: Path, tmp_path: Path
) -> None:
    for as_published in (True, False):
        job = job_of(
            tiny("ofa-cn"), "muge-caption", uneven_captions, tmp_path / "run", as_published=as_published,
            more={"batch.image_size": 64},
        )  # fmt: skip
        model = prepare(job).loaded.model.train()
        assert model.model.encoder.layers[0].training is as_published
        assert not any(parameter.requires_grad for parameter in model.model.encoder.parameters())


@pytest.mark.parametrize("name", GUIDES)
def test_mistakes_of_the_guide_are_printed_and_reported(
    name: str, tiny: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, model, _, settings = RECIPES[name]
    family = "ofa" if model.startswith("ofa") else model
    mistakes = shipped_recipes()[recipe].published[family].mistakes
    words = [str(tiny(model)), "--data", str(source_of(name, request)), "--recipe", recipe, "--as-published"]
    arguments = [*words, "-o", str(tmp_path / "run"), *assigned({**STEPS, **settings})]
    done = CliRunner().invoke(cli.port_finetune, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert mistakes
    for mistake in mistakes:
        assert " ".join(mistake.split()) in shown
        assert mistake.split("(")[0].strip(" `").split("`")[0][:30] in report
    plain = CliRunner().invoke(
        cli.port_finetune, [word for word in arguments if word != "--as-published"] + ["--overwrite"]
    )
    assert plain.exit_code == 0, plain.output
    assert "wrong" not in plain.output


def test_recipe_without_a_guide_cannot_be_run_as_published(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="follows no published guide"):
        job_of(tiny("florence2"), "default", pairs, tmp_path / "run", as_published=True)
