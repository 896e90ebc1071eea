"""Runs on data of other trainers' formats: chats, text alone, several data sets, a held-out share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from drawn_data import draw_jsonl, encoded, write_lines
from PIL import Image
from tiny_runs import CAPTIONS, FIXED_RATE, job_of, losses, run, still
from transformers import Trainer

from weightport import cli
from weightport.errors import DataError
from weightport.finetuning.augmentation import Augmentation
from weightport.finetuning.data import DataSettings, open_data, open_divided
from weightport.finetuning.data.collation import BadSamples, Collator, Indexed
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.recipes.recipe import load_recipe
from weightport.finetuning.setup.model_loading import load_processor
from weightport.finetuning.training.trainer import PortTrainer

FEW = {
    **FIXED_RATE,
    "training.max_steps": 2,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    "training.per_device_train_batch_size": 2,
    "training.bf16": False,
    "evaluation.generation.max_new_tokens": 4,
}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Chats of two turns about two pictures."""
    draw_jsonl(tmp_path, 2).unlink()
    turns = [("what is it?", "red cat"), ("its hat?", "old hat")]
    messages = [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]
    return write_lines(tmp_path / "chats.jsonl", [{"messages": messages, "images": [f"{n}.png"]} for n in range(2)])


def command(*words: object) -> Result:
    return CliRunner().invoke(cli.port_finetune, [str(word) for word in words])


def test_a_chat_is_learned_behind_what_was_said_before(tiny: Callable[[str], Path], chats: Path) -> None:
    job = job_of(tiny("moondream2"), "default", chats, chats.parent / "run")
    processor = load_processor(job.model, job.family, job.recipe.batch)
    samples = open_data(chats, DataSettings())
    config = json.loads((job.model / "config.json").read_text())
    from transformers import AutoConfig

    collator = Collator(
        job.family, processor, AutoConfig.from_pretrained(job.model), job.recipe.batch, BadSamples(samples, 0)
    )
    made = collator([Indexed(samples)[1]])
    assert config["model_type"] and "failure" not in made
    labels, ids = made["labels"][0], made["input_ids"][0]
    learned = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
    seen = processor.tokenizer.decode(ids[labels == -100], skip_special_tokens=True)
    assert learned.strip() == "old hat"
    assert seen.index("what is it?") < seen.index("red cat") < seen.index("its hat?")


def test_chats_train_a_family_that_holds_them_and_others_name_the_way_out(
    tiny: Callable[[str], Path], chats: Path, tmp_path: Path
) -> None:
    outcome = run(tiny("moondream2"), "default", chats, tmp_path / "a", eval_data=chats, more=FEW)
    predictions = [
        json.loads(line) for line in next((tmp_path / "a" / "predictions").iterdir()).read_text().splitlines()
    ]
    assert outcome.metrics and len(predictions) == 4
    assert [("Question: what is it?" in row["prompt"], row["references"]) for row in predictions[:2]] == [
        (True, ["red cat"]),
        (True, ["old hat"]),
    ]
    with pytest.raises(
        DataError, match=r"chats\.jsonl, line 1, answer 2: an answer after 1 others.*data\.turns=alone"
    ):
        run(tiny("florence2"), "default", chats, tmp_path / "b", more={**FEW, "data.skip_bad": 0})
    assert not (tmp_path / "b").exists()
    run(tiny("florence2"), "default", chats, tmp_path / "c", data__turns="alone", more=FEW)


def test_text_alone_trains_a_family_that_reads_it_and_is_named_by_others(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    draw_jsonl(tmp_path, 2)
    rows = [
        {"image": image, "prefix": "what is it?", "suffix": text} for image, text in zip(("0.png", None), CAPTIONS)
    ]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    settings = {**FEW, "data.text_only": True}
    run(tiny("ofa"), "default", path, tmp_path / "a", eval_data=path, more={**settings, "batch.image_size": 64})
    for family in ("florence2", "paligemma2", "moondream2", "blip2"):
        with pytest.raises(
            DataError, match=rf"mixed\.jsonl, line 2: a sample without a picture, and {family} is asked"
        ):
            run(tiny(family), "default", path, tmp_path / "b", more=settings)


def test_text_alone_in_a_mixed_batch_has_the_loss_that_it_has_alone(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    draw_jsonl(tmp_path, 2)
    texts = [{"image": None, "prefix": f"what is {n}?", "suffix": CAPTIONS[n]} for n in range(2)]
    mixed = [texts[0], {"image": "0.png", "prefix": "what is it?", "suffix": CAPTIONS[2]}]
    settings = {
        **FEW,
        **still(tiny("ofa")),
        "data.text_only": True,
        "batch.image_size": 64,
        "batch.loss_mean": "samples",
    }
    settings |= {"training.max_steps": 1, "training.label_smoothing_factor": 0.0}

    def first_loss(name: str, rows: list[dict[str, object]]) -> float:
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        return losses(run(tiny("ofa"), "default", path, tmp_path / name, more=settings).history)[1]

    picture, text = first_loss("picture", [mixed[1]] * 2), first_loss("text", [texts[0]] * 2)
    assert first_loss("mixed", mixed) == pytest.approx((picture + text) / 2, rel=1e-4)


def test_several_data_sets_and_a_held_out_share_on_the_command_line(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    first, second = draw_jsonl(tmp_path / "a", 24), draw_jsonl(tmp_path / "b", 16)
    words = [word for key, value in FEW.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    model, output = tiny("florence2"), tmp_path / "run"
    done = command(
        model, "--data", first, "--data", f"{tmp_path}/[b]/*.jsonl", "--data-weights", "2,1", "--eval-fraction",
        "0.4", "-o", output, "--set", "evaluation.metrics=[exact-match, bleu-4]", *words,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    training, evaluation = open_divided([first, second], DataSettings(weights=(2, 1)), 0.4)
    assert f"{len(training)} samples · measured on {len(evaluation)}" in done.output
    record = json.loads((output / "model" / "training.json").read_text())
    assert record["eval_data"]["samples"] == len(evaluation) > 12
    assert record["data"]["name"] == "a/annotations.jsonl, b/annotations.jsonl"
    assert (output / "report.html").read_text().count("<img ") == len(evaluation), "every sample has its picture"
    told = done.output
    assert "steps    2 · learning rate" in told and "batch    2 samples a step · 1 process on cpu" in told
    assert "bleu-4 " in told and "bleu-1" not in told and "brevity" not in told
    assert "reference  " in told and "model      " in told
    assert "bleu-1" in json.loads((output / "metrics.json").read_text())
    # The recipe of the run gives the share again; measuring takes it only where it is asked for.
    evaluate = [model, "--data", first, "--data", second, "--recipe", output / "recipe.yaml", "--json"]
    counts = []
    for more in ([], ["--eval-fraction", "0.4"]):
        result = CliRunner().invoke(cli.main, ["evaluate", *map(str, evaluate), *more])
        assert result.exit_code == 0, result.output
        counts.append(json.loads(result.output)["samples"])
    assert counts == [40, len(evaluation)]
    again = command(model, "--data", first, "--eval-fraction", "0.3", "--eval-data", second, "-o", tmp_path / "c")
    assert again.exit_code == 2 and "give one of them" in again.output


@pytest.mark.parametrize("fraction", ["0", "1", "nan"])
def test_a_share_of_nothing_or_all_is_a_usage_error(tiny: Callable[[str], Path], pairs: Path, fraction: str) -> None:
    done = command(tiny("florence2"), "--data", pairs, "--eval-fraction", fraction, "-o", pairs.parent / "never")
    assert done.exit_code == 2 and "data.eval_fraction is" in done.output, done.output


def test_class_folders_say_what_they_took_for_the_answer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").write_bytes(encoded(number))
    settings = {**FEW, "batch.prompt": "what is it?"}
    outcome = run(tiny("florence2"), "default", tmp_path / "data", tmp_path / "run", more=settings)
    assert any("answers are the names of its 2 folders (cat, dog)" in note for note in outcome.notes)


def test_drafts_and_changes_are_for_training_and_evaluation_reads_whole_pictures(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts: list[tuple[str, int | None]] = []
    changed: list[int] = []
    read, change, stage = Picture.read, Augmentation.__call__, ["prepare"]

    def reading(picture: Picture, draft: int | None = None) -> Image.Image:
        drafts.append((stage[0], draft))
        return read(picture, draft)

    def changing(own: Augmentation, index: int, *found: Any) -> Any:
        changed.append(index)
        return change(own, index, *found)

    monkeypatch.setattr(Picture, "read", reading)
    monkeypatch.setattr(Augmentation, "__call__", changing)
    settings = {**FEW, "data.draft": 16, "batch.augment": ["color"]}
    monkeypatch.setattr(Trainer, "train", staged(Trainer.train, "train", stage))
    monkeypatch.setattr(PortTrainer, "evaluate", staged(PortTrainer.evaluate, "evaluate", stage))
    run(tiny("florence2"), "default", pairs, tmp_path / "run", eval_data=pairs, more=settings)
    assert {draft for where, draft in drafts if where == "train"} == {16} and len(changed) == 4
    assert {draft for where, draft in drafts if where != "train"} == {None}


def staged(method: Callable[..., Any], name: str, stage: list[str]) -> Callable[..., Any]:
    """The method, naming itself while it runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before, stage[0] = stage[0], name
        try:
            return method(*args, **kwargs)
        finally:
            stage[0] = before

    return call


def test_a_recipe_holds_every_setting_of_data(tmp_path: Path) -> None:
    text = (
        "name: own\ntitle: Own\nfamilies: [florence2]\n"
        "data: {images: [/, pictures], turns: alone, text_only: true, weights: [2, 0.5], eval_fraction: 0.05,\n"
        "  draft: 768}\n"
    )
    (tmp_path / "own.yaml").write_text(text)
    data = load_recipe(str(tmp_path / "own.yaml")).data
    assert (data.images, data.weights, data.eval_fraction) == (("/", "pictures"), (2.0, 0.5), 0.05)
    assert (data.turns, data.text_only, data.draft) == ("alone", True, 768)


@pytest.mark.parametrize(("name", "command_line"), [("florence2", "port-florence2"), ("ofa", "port-ofa")])
def test_an_original_checkpoint_is_answered_with_the_command_that_converts_it(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path, name: str, command_line: str
) -> None:
    original = tiny(name).parent / "original"
    file = next(each for each in sorted(original.iterdir()) if each.suffix in (".pt", ".safetensors"))
    for given in (original, file) if name == "ofa" else (original,):
        done = command(given, "--data", pairs, "-o", tmp_path / "run")
        assert done.exit_code == 1 and f"Convert it first: {command_line} {given} OUT" in done.output, done.output
    assert not (tmp_path / "run").exists()
