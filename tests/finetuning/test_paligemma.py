"""PaliGemma's sequences, tasks and adapters: what the original trains on, and what the recipe json-extract says of
it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import draw_receipts
from PIL import Image
from tiny_processes import side_by_side
from tiny_runs import FIXED_RATE, GOLDEN, MODELS, job_of, losses, run, still
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from weightport.api import merge_lora
from weightport.checkpoints import open_checkpoint
from weightport.errors import DataError, RecipeError, TrainingError
from weightport.families.paligemma2.training import TRAINING, read_objects, written_objects
from weightport.finetuning.data import open_data
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.evaluation.evaluate import evaluate
from weightport.finetuning.recipes.recipe import for_family, load_recipe, with_settings
from weightport.finetuning.recipes.settings import BatchSettings
from weightport.finetuning.setup.freezing import frozen_parts, shares
from weightport.finetuning.setup.lora_layers import with_lora
from weightport.finetuning.setup.preparing import prepare
from weightport.finetuning.training.trainer import loss_of_samples

SHORT = {
    "training.learning_rate": 1e-2,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 3,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    **FIXED_RATE,
}
PICTURE = Image.new("RGB", (60, 40), "red")


@pytest.fixture
def case() -> Any:
    sys.path.insert(0, str(GOLDEN))
    from golden_case import Case

    return Case(GOLDEN / "cases" / MODELS["paligemma2"], "tiny-gemma2")


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny("paligemma2")).eval()


@pytest.fixture
def processor(tiny: Callable[[str], Path]) -> Any:
    return AutoProcessor.from_pretrained(tiny("paligemma2"))


def encoded(processor: Any, case: Any) -> dict[str, torch.Tensor]:
    """The golden case's prompts and answers, with its own pixels."""
    prompts, answers = zip(*case.spec["reference"]["prefixes_and_suffixes"])
    tensors = TRAINING.encode(processor, None, BatchSettings(), prompts, answers, [PICTURE] * len(prompts))
    return {**tensors, "pixel_values": case.tensors["in.image"].permute(0, 3, 1, 2)}


def test_texts_become_the_sequences_that_the_original_trains_on(processor: Any, case: Any) -> None:
    made, places = encoded(processor, case), processor.image_seq_length
    assert bool((made["input_ids"][:, :places] == processor.image_token_id).all())
    length = made["input_ids"].shape[1] - places
    for name, original in {
        "input_ids": "in.text", "token_type_ids": "in.mask_loss", "attention_mask": "in.mask_valid",
    }.items():  # fmt: skip
        assert torch.equal(made[name][:, places:], case.tensors[original][:, :length].long()), name
        assert not case.tensors[original][:, length:].any(), "the original's sequences are longer"
    answered = made["labels"] != -100
    assert torch.equal(answered, made["token_type_ids"] == 1)
    assert torch.equal(made["labels"][answered], made["input_ids"][answered])


def test_texts_and_pixels_give_the_losses_and_answers_of_the_original(model: Any, processor: Any, case: Any) -> None:
    made = encoded(processor, case)
    with torch.no_grad():
        output = model(**made)
        by_sample = loss_of_samples(output, made["labels"], shift=True)
    assert float(output.loss) == pytest.approx(float(case.tensors["loss.token_mean"]), abs=5e-6)
    assert float(by_sample) == pytest.approx(float(case.tensors["loss.trainer"]), abs=5e-6)
    assert float(by_sample) != pytest.approx(float(output.loss), abs=1e-2)

    prompts = [prompt for prompt, _ in case.spec["reference"]["prefixes_and_suffixes"]]
    asked = TRAINING.questions(processor, BatchSettings(), prompts, [PICTURE] * len(prompts))
    assert not asked["attention_mask"][:, 0].all(), "no prompt is padded"
    asked["pixel_values"] = made["pixel_values"]
    wanted = case.tensors["generate.greedy"].long()
    ids = model.generate(**asked, max_new_tokens=wanted.shape[1], do_sample=False, eos_token_id=None)
    assert torch.equal(ids[:, asked["input_ids"].shape[1] :], wanted)


def test_text_that_spells_out_the_image_token_is_text(model: Any, processor: Any) -> None:
    prompts, answers = ["what is <image>?"], ["it is <image>"]
    made = TRAINING.encode(processor, None, BatchSettings(), prompts, answers, [PICTURE])
    assert int((made["input_ids"] == processor.image_token_id).sum()) == processor.image_seq_length
    kept = made["input_ids"][0, processor.image_seq_length :]
    assert processor.tokenizer.decode(kept) == "<bos>what is <image>?\nit is <image><eos>"
    assert torch.isfinite(model(**made).loss)


def test_sample_without_a_picture_is_refused(processor: Any) -> None:
    with pytest.raises(DataError, match="a sample has none"):
        TRAINING.questions(processor, BatchSettings(), ["ocr", "ocr"], [PICTURE, None])


def test_room_is_what_the_positions_leave_beside_the_image(processor: Any, model: Any) -> None:
    room = TRAINING.room(processor, model.config)
    assert (room.total, room.answer, room.prompt) == (8192, 8192 - 9 - 2, 8192 - 9 - 3)
    longest = TRAINING.encode(processor, None, BatchSettings(), [""], ["a" * 4], [PICTURE])
    tokens = len(processor.tokenizer("a" * 4, add_special_tokens=False)["input_ids"])
    assert longest["input_ids"].shape[1] == room.total - room.answer + tokens + 1


def test_places_are_written_in_y_x_order_and_read_back() -> None:
    objects = Objects(("cat", "red box"), ((10.0, 20.0, 30.0, 40.0), (0.0, 0.0, 200.0, 100.0)), (200, 100))
    text = written_objects(objects)
    assert text == "<loc0204><loc0051><loc0409><loc0153> cat ; <loc0000><loc0000><loc1023><loc1023> red box"
    found = list(read_objects(text, objects.size))
    assert [label for label, _ in found] == list(objects.labels)
    for (_, box), wanted in zip(found, objects.boxes):
        assert all(abs(a - b) <= side / 1024 for a, b, side in zip(box, wanted, (200, 100) * 2))
    broken = "<loc0001><loc0002> cat ; no ; <loc0001><loc0002><loc0003><loc0004>dog"
    assert [label for label, _ in read_objects(broken, (8, 8))] == ["dog"]


def test_tasks_are_asked_as_the_original_was_trained(processor: Any, boxes: Path) -> None:
    def asked(task: str, sample: Sample) -> str:
        return TRAINING.prompt(processor, BatchSettings(task=task), sample)

    sample = Sample("here", None, "how many?", "", ())
    assert asked("caption", sample) == "caption en"
    assert asked("vqa", sample) == "answer en how many?"
    with pytest.raises(RecipeError, match=r"these data name none.*data\.form=detection"):
        asked("detection", sample)
    with pytest.raises(RecipeError, match=r"no task 'dance'.*caption, ocr, vqa, detection"):
        asked("dance", sample)
    # All classes of the data, in every picture: those of a picture alone would tell the answer.
    found = open_data(str(boxes), DataSettings(reader="coco", form="detection"))
    assert {asked("detection", found[index]) for index in range(len(found))} == {"detect cat ; dog"}


def test_boxes_beyond_the_longest_answer_are_refused(processor: Any) -> None:
    objects = Objects(("cat",), ((0.0, 0.0, 4.0, 4.0),), (8, 8))
    sample = Sample("photo 3", None, "", "", (), objects)
    assert TRAINING.answer(processor, BatchSettings(), sample).endswith(" cat")
    with pytest.raises(DataError, match=r"photo 3: its boxes are \d+ tokens, batch\.max_target_length is 5"):
        TRAINING.answer(processor, BatchSettings(max_target_length=5), sample)


def test_another_size_of_picture_is_refused(tiny: Callable[[str], Path], receipts: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch\.image_size is 42 for this model"):
        run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", batch__image_size=84)


@pytest.mark.parametrize(
    ("as_published", "adapters", "parameters", "in_vision"),
    [(False, 182, 10_383_360, 0), (True, 263, 11_876_352, 1_492_992)],
)
def test_recipe_adapts_the_language_model_and_as_published_the_vision_tower_too(
    as_published: bool, adapters: int, parameters: int, in_vision: int, tiny: Callable[[str], Path]
) -> None:
    """The figures of the 3b model, which is built without memory."""
    config = AutoConfig.from_pretrained(tiny("paligemma2"))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.head_dim = 2304, 26, 9216, 256
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 8, 4, ["full_attention"] * 26
    vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size = 1152, 27, 4304
    vision.num_attention_heads, vision.projection_dim = 16, 2304
    with torch.device("meta"):
        bare = AutoModelForImageTextToText.from_config(config)
    assert {TRAINING.parts.part_of(name) for name, _ in bare.named_parameters(remove_duplicate=False)} == set(
        TRAINING.parts.prefixes
    )
    recipe = for_family(load_recipe("json-extract"), "paligemma2", as_published=as_published)
    tuned = with_lora(bare, TRAINING.parts, frozen_parts(TRAINING.parts, recipe.model.freeze), recipe.lora)
    found = {share.part: share.trainable for share in shares(tuned, TRAINING.parts)}
    assert sum(name.endswith("lora_A.default.weight") for name, _ in tuned.named_parameters()) == adapters
    assert (sum(found.values()), found["vision"]) == (parameters, in_vision)


def test_run_as_published_says_what_the_guide_does_wrong(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    more = {**SHORT, "model.dtype": "float32"}
    out = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", as_published=True, more=more)
    record = json.loads((out.directory / "training.json").read_text())
    assert record["as_published"] and record["trainable"]["vision"][0] > 0
    assert "the vision tower" in (tmp_path / "run" / "report.html").read_text()
    plain = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "plain", more=more)
    assert json.loads((plain.directory / "training.json").read_text())["trainable"]["vision"][0] == 0


def test_guide_names_beside_a_frozen_tower_are_refused(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    more = {**SHORT, "lora.target_modules": ["q_proj", "k_proj"]}
    with pytest.raises(RecipeError, match=r"reaches into what is frozen.*model\.vision_tower\..*\(vision\)"):
        run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", more=more)


def test_answers_that_are_cut_are_said(tiny: Callable[[str], Path], receipts: str, tmp_path: Path) -> None:
    """JSON that is cut teaches JSON that does not end."""
    more = {**SHORT, "training.per_device_train_batch_size": 4, "training.max_steps": 1}
    whole = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "whole", more=more)
    assert not any("is cut" in note for note in whole.notes)
    short = {**more, "batch.max_target_length": 60, "training.dataloader_num_workers": 1}
    cut = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "cut", more=short)
    wanted = "2 samples have answers of batch.max_target_length (60 tokens): what is longer is cut"
    assert any(note.startswith(wanted) for note in cut.notes), cut.notes


def test_recipe_has_the_settings_of_the_guide() -> None:
    recipe = for_family(load_recipe("json-extract"), "paligemma2")
    wanted = {
        "num_train_epochs": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 16,
        "learning_rate": 5e-5, "warmup_steps": 2, "weight_decay": 1e-6, "adam_beta2": 0.999, "optim": "adamw_torch",
    }  # fmt: skip
    assert {name: recipe.training[name] for name in wanted} == wanted
    assert (recipe.lora["r"], recipe.model.method, recipe.model.freeze) == (8, "lora", ("vision", "projector"))
    assert recipe.evaluation.metrics == ("json-valid", "json-f1", "json-edit")
    assert recipe.evaluation.generation["max_new_tokens"] == 256


def test_full_training_leaves_frozen_parts_and_the_names_on_disk_as_they_were(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    base = open_checkpoint(tiny("paligemma2"))
    out = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", more={**SHORT, "model.method": "full"})
    tuned = open_checkpoint(out.directory)
    assert set(tuned) == set(base)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in tuned
    for name in base:
        same = torch.equal(base[name].read(), tuned[name].read())
        assert same == name.startswith(("vision_tower.", "multi_modal_projector.")), name


def test_best_model_of_a_full_run_is_the_one_that_was_best(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    """Checkpoints hold the names in memory: read by the names on disk, nothing of them would be loaded."""
    more = {
        **SHORT, "model.method": "full", "training.max_steps": 4, "training.eval_strategy": "steps",
        "training.eval_steps": 1, "training.save_strategy": "steps", "training.save_steps": 1,
        "training.save_total_limit": None, "training.load_best_model_at_end": True,
        "training.learning_rate": 0.3, "evaluation.metrics": [],
    }  # fmt: skip
    out = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", eval_data=receipts, more=more)
    measured = {entry["step"]: entry["eval_loss"] for entry in out.history if "eval_loss" in entry}
    best = min(measured, key=lambda step: measured[step])
    assert out.step == best < 4, "the last step is the best: this shows nothing"
    kept = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}")
    result = AutoModelForImageTextToText.from_pretrained(out.directory)
    for (name, a), (_, b) in zip(kept.named_parameters(), result.named_parameters()):
        assert torch.equal(a, b), name


def test_checkpoint_without_some_tensors_is_refused(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    """Trainer warns, and goes on from the base's values there."""
    from safetensors.torch import load_file, save_file

    more = {**SHORT, "model.method": "full", "training.save_strategy": "steps", "training.save_steps": 2}
    run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", more=more)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-3", ignore_errors=True)
    weights = checkpoints / "checkpoint-2" / "model.safetensors"
    tensors = load_file(weights)
    assert "model.language_model.norm.weight" in tensors, "a checkpoint has the names in memory"
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(TrainingError, match=r"lacks 1 of the model's tensors, such as model\.language_model\.norm"):
        run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", resume=True, more=more)


def test_samples_mean_is_the_same_however_batches_are_cut(
    tiny: Callable[[str], Path], model: Any, processor: Any, receipts: str, tmp_path: Path
) -> None:
    seen = {}
    for mean in ("samples", "tokens"):
        for batch, accumulated in ((4, 1), (2, 2)):
            more = {**SHORT, **still(tiny("paligemma2")), "batch.loss_mean": mean, "model.method": "full"}
            more |= {
                "training.per_device_train_batch_size": batch, "training.gradient_accumulation_steps": accumulated,
                "training.learning_rate": 1e-3, "training.max_steps": 2,
            }  # fmt: skip
            out = run(tiny("paligemma2"), "json-extract", receipts, tmp_path / f"{mean}{batch}", more=more)
            seen[mean, batch] = losses(out.history)
        assert seen[mean, 2] == pytest.approx(seen[mean, 4], rel=1e-6)
    assert seen["samples", 4][1] != pytest.approx(seen["tokens", 4][1], rel=1e-3)
    samples = open_data(receipts, DataSettings())
    rows = [samples[index] for index in range(4)]
    batch = TRAINING.encode(
        processor, None, BatchSettings(), [row.prefix for row in rows], [row.suffix for row in rows],
        [row.picture.read() for row in rows if row.picture],
    )  # fmt: skip
    with torch.no_grad():
        output = model(**batch)
        by_sample = float(loss_of_samples(output, batch["labels"], shift=True))
    assert seen["samples", 4][1] == pytest.approx(by_sample, rel=1e-6)
    assert seen["tokens", 4][1] == pytest.approx(float(output.loss), rel=1e-6)


def test_samples_mean_of_two_processes_is_that_of_one(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    more = {**SHORT, **still(tiny("paligemma2")), "batch.loss_mean": "samples", "training.learning_rate": 1e-3}
    one = run(
        tiny("paligemma2"), "json-extract", receipts, tmp_path / "one",
        more={**more, "training.per_device_train_batch_size": 2},
    )  # fmt: skip
    job = job_of(
        tiny("paligemma2"), "json-extract", receipts, tmp_path / "two",
        more={**more, "training.per_device_train_batch_size": 1},
    )  # fmt: skip
    assert side_by_side(job, 2) == [0, 0]
    assert len(losses(one.history)) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(one.history), rel=5e-7)


def test_gemma_2_attends_eagerly_beside_a_tower_that_does_not(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    """transformers' fused attention knows no softcap of scores."""
    loaded = prepare(job_of(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", more=SHORT)).loaded
    config = loaded.model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == ("eager", "sdpa")


def test_two_means_of_a_loss_are_refused(tiny: Callable[[str], Path], receipts: str, tmp_path: Path) -> None:
    more = {**SHORT, "batch.loss_mean": "samples", "training.label_smoothing_factor": 0.1}
    with pytest.raises(RecipeError, match="are two losses"):
        prepare(job_of(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", more=more))


def test_adapter_merges_to_the_model_that_was_measured(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = draw_receipts(tmp_path / "data", {"train": 3, "valid": 2, "test": 1})
    base, more = tiny("paligemma2"), {**SHORT, "training.max_steps": 30, "evaluation.generation.max_new_tokens": 40}
    out = run(base, "json-extract", f"{data}:train", tmp_path / "run", eval_data=f"{data}:valid", more=more)
    assert out.metrics["json-edit"] < 1.0
    merge_lora(base, [(out.directory, 1.0)], tmp_path / "merged")
    recipe = with_settings(for_family(load_recipe("json-extract"), "paligemma2"), {
        "evaluation.generation.max_new_tokens": 40, "training.dataloader_num_workers": 0}, "here")  # fmt: skip
    merged = evaluate(tmp_path / "merged", TRAINING, f"{data}:valid", recipe)
    adapted = evaluate(base, TRAINING, f"{data}:valid", recipe, adapter=out.directory)
    wanted = {name: value for name, value in out.metrics.items() if name != "eval_loss"}
    assert merged.metrics == pytest.approx(wanted) and adapted.metrics == pytest.approx(wanted)
    assert all("extract JSON" not in each.text for each in merged.predictions)


def test_prompt_and_answer_beyond_the_positions_are_refused_by_line(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    short = with_positions(tiny("paligemma2"), 40, tmp_path / "short")
    with pytest.raises(
        DataError, match=r"annotations\.jsonl, line \d: prompt and answer are \d+ tokens together.* 40"
    ):
        run(short, "json-extract", receipts, tmp_path / "run", more={**SHORT, "batch.max_target_length": 256})
    assert not (tmp_path / "run").exists()


def with_positions(model: Path, positions: int, out: Path) -> Path:
    """A copy of the model directory whose text has so many positions."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_attention_that_the_model_lacks_is_said_before_the_run(
    tiny: Callable[[str], Path], receipts: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"model\.attention.*sdpa"):
        run(tiny("paligemma2"), "json-extract", receipts, tmp_path / "run", more={**SHORT, "model.attention": "sdpa"})
