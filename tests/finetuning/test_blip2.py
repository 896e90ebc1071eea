"""BLIP-2's batches and losses against those that LAVIS trains with, and the guide's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import draw
from tiny_runs import FIXED_RATE, GOLDEN, convert_case, losses, run, still
from transformers import AutoModelForImageTextToText, AutoProcessor

from weightport.api import export
from weightport.errors import RecipeError
from weightport.families.registry import registry
from weightport.finetuning.data.samples import Sample
from weightport.finetuning.recipes.settings import BatchSettings

sys.path.insert(0, str(GOLDEN))

from golden_case import Case

LAVIS_LOSS, GUIDE_LOSS = 6.6423, 5.8374
"""Of opt-tiny with LAVIS's labels, and with labels = input_ids, where queries and padding count. The second one was
measured with the image's token at the last row of the embedding."""
LAST_ROW = 359


def case(name: str) -> Case:
    return Case(GOLDEN / "cases" / "blip2" / name, name)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {"blip2": "opt-tiny", "blip2-t5": "t5-coco-tiny", "blip2/opt-interp-tiny": "opt-interp-tiny"}
    return {case: convert_case(name, tmp_path_factory.mktemp(case)) for name, case in names.items()}


def encoded(directory: Path, batch: BatchSettings, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(directory)
    stage = registry().training_of(directory)
    return stage.encode(processor, None, batch, prompts, answers, [draw(number) for number in range(len(prompts))])


@pytest.mark.parametrize(("name", "prompt"), [("opt-tiny", ""), ("opt-interp-tiny", "a photo of")])
def test_captions_and_their_labels_are_those_that_lavis_gives_opt(name: str, prompt: str, directories) -> None:
    given, lavis = case(name).tensors, case(name).spec["config"]["lavis"]
    captions = [text.removeprefix(prompt).strip() for text in case(name).spec["reference"]["captions"]]
    batch = BatchSettings(max_target_length=lavis["max_txt_len"])
    made = encoded(directories[name], batch, [prompt] * len(captions), captions)
    queries = lavis["num_query_token"]
    assert torch.equal(made["input_ids"][:, queries:], given["input_ids"])
    assert torch.equal(made["attention_mask"], given["lm_attention_mask"])
    assert torch.equal(made["labels"], given["labels"])


def test_questions_and_answers_are_those_that_lavis_gives_t5(directories) -> None:
    given, reference = case("t5-coco-tiny").tensors, case("t5-coco-tiny").spec["reference"]
    batch = BatchSettings(max_target_length=32)
    made = encoded(directories["t5-coco-tiny"], batch, reference["captions"], reference["targets"])
    assert torch.equal(made["input_ids"][:, 6:], given["input_ids"])
    assert torch.equal(made["attention_mask"], given["lm_attention_mask"])
    assert torch.equal(made["labels"], given["labels"])
    assert torch.equal(made["decoder_attention_mask"], given["decoder_attention_mask"])


@pytest.mark.parametrize(("count_padding", "expected"), [(False, LAVIS_LOSS), (True, GUIDE_LOSS)])
def test_losses_are_lavis_and_the_guides(count_padding: bool, expected: float, directories) -> None:
    given, reference = case("opt-tiny").tensors, case("opt-tiny").spec["reference"]
    captions = reference["captions"]
    batch = BatchSettings(max_target_length=32, count_padding=count_padding)
    made = encoded(directories["opt-tiny"], batch, [""] * len(captions), captions)
    model = AutoModelForImageTextToText.from_pretrained(directories["opt-tiny"], dtype=torch.float32).eval()
    image, model.config.image_token_index = model.config.image_token_index, LAST_ROW
    made |= {name: made[name].masked_fill(made[name] == image, LAST_ROW) for name in ("input_ids", "labels")}
    with torch.no_grad():
        loss = model(**{**made, "pixel_values": given["pixel_values"]}).loss
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_questions_put_padding_between_queries_and_text_for_opt_and_behind_it_for_t5(directories) -> None:
    for name, left in (("opt-tiny", True), ("t5-coco-tiny", False)):
        processor = AutoProcessor.from_pretrained(directories[name])
        stage = registry().training_of(directories[name])
        asked = ["a photo of", "Question: how many cats are there? Answer:"]
        made = stage.questions(processor, BatchSettings(), asked, [draw(0), draw(1)])
        queries, mask = processor.num_query_tokens, made["attention_mask"][0]
        assert mask[:queries].all()
        assert mask[-1] == left and mask[queries] == (not left)
        assert made["pixel_values"].shape[0] == 2


def test_a_prompt_that_spells_out_the_images_token_adds_no_image(directories) -> None:
    processor = AutoProcessor.from_pretrained(directories["opt-tiny"])
    stage = registry().training_of(directories["opt-tiny"])
    ids = stage.questions(processor, BatchSettings(), ["what is <image>?"], [draw(0)])["input_ids"]
    assert int((ids == len(processor.tokenizer) - 1).sum()) == processor.num_query_tokens


def test_prompts_are_lavis() -> None:
    stage = registry()["blip2"].training
    sample = Sample("here", None, "how many?", "two", ("two",))

    class Processor:
        tokenizer = None

    for task, expected in (("caption", "a photo of"), ("vqa", "Question: how many? Short answer:")):
        assert stage.prompt(Processor(), BatchSettings(task=task), sample) == expected
    with pytest.raises(RecipeError, match="no task 'detection'"):
        stage.prompt(Processor(), BatchSettings(task="detection"), sample)


def test_a_model_for_retrieval_is_not_trained() -> None:
    with pytest.raises(RecipeError, match="image-text retrieval"):
        registry()["blip2"].training_of({"qformer_config": {"use_qformer_text_input": True}})


STEPS: dict[str, Any] = {
    "training.learning_rate": 1e-3,
    "training.max_steps": 2,
    "training.bf16": False,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    **FIXED_RATE,
}


@pytest.mark.parametrize("name", ["blip2", "blip2-t5"])
def test_batches_that_make_a_step_together_have_the_loss_of_one(
    name: str, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    at_once, in_parts = (
        losses(
            run(
                tiny(name),
                "caption",
                pairs,
                tmp_path / str(size),
                more={
                    **still(tiny(name)),
                    **STEPS,
                    "training.per_device_train_batch_size": size,
                    "training.gradient_accumulation_steps": 4 // size,
                },
            ).history
        )
        for size in (4, 1)
    )
    assert at_once == pytest.approx(in_parts, rel=1e-5)


def test_as_published_trains_on_every_position_and_says_so(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    settings = {**still(tiny("blip2")), **STEPS, "training.per_device_train_batch_size": 4, "lora.lora_dropout": 0.0}
    own = run(tiny("blip2"), "lora-caption", pairs, tmp_path / "own", more=settings)
    guide = run(tiny("blip2"), "lora-caption", pairs, tmp_path / "guide", as_published=True, more=settings)
    assert losses(own.history)[1] != pytest.approx(losses(guide.history)[1], rel=1e-3)
    assert "labels are input_ids" in (tmp_path / "guide" / "report.html").read_text()


def test_lora_changes_the_modules_that_the_guide_names(tiny: Callable[[str], Path], pairs: Path, tmp_path) -> None:
    from safetensors.torch import load_file

    for name, expected in (
        ("blip2", r"language_model.model.decoder.layers.0.self_attn.q_proj"),
        ("blip2-t5", r"language_model.decoder.block.1.layer.1.EncDecAttention.v"),
    ):
        run(tiny(name), "lora-caption", pairs, tmp_path / name, more={**STEPS})
        keys = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert f"base_model.model.{expected}.lora_A.weight" in keys
        ends = {key.split(".lora_")[0].rpartition(".")[2] for key in keys}
        assert ends == ({"q_proj", "v_proj"} if name == "blip2" else {"q", "v"})


def exported(directory: Path, target: Path) -> dict[str, torch.Tensor]:
    return torch.load(export(directory, target).path, weights_only=True)["model"]


def test_what_a_run_trained_is_exported_whichever_source_it_came_from(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    first = run(tiny("blip2"), "lavis-caption", pairs, tmp_path / "first", more=STEPS).directory
    before, after = (exported(each, tmp_path / f"{n}.pth") for n, each in enumerate((tiny("blip2"), first)))
    assert not any(name.startswith("visual_encoder.") for name in before)
    bias = load_file(first / "model.safetensors")["vision_model.encoder.layers.0.self_attn.qkv.bias"]
    assert torch.equal(after["visual_encoder.blocks.0.attn.q_bias"], bias[: len(bias) // 3])
    assert not any(name.startswith("opt_model.") for name in after)
    # A second run that leaves the encoder alone does not make it what it was.
    more = {**STEPS, "model.freeze": ["vision", "language"]}
    second = run(first, "lavis-caption", pairs, tmp_path / "second", more=more).directory
    again = exported(second, tmp_path / "again.pth")
    assert again.keys() == after.keys()
    assert torch.equal(again["visual_encoder.cls_token"], after["visual_encoder.cls_token"])
    assert not torch.equal(again["query_tokens"], after["query_tokens"])
