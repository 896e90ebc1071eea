"""What a user does with a converted Florence-2: pipelines, tasks on drawn pictures, training, saving, merging."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from florence2_checkpoints import HEAD, SHARED, originals
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, Florence2ForConditionalGeneration, pipeline

from weightport.api import convert
from weightport.cli import main, port_florence2
from weightport.modeling.florence2 import Florence2OriginalProcessor

SIZE = (120, 80)  # width, height


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return originals(tmp_path_factory)


@pytest.fixture(scope="module")
def directories(original, tmp_path_factory):
    """Case name → its converted directory in float32."""
    return {
        name: convert(original(name).folder, tmp_path_factory.mktemp("use") / name).directory
        for name in ("tiny-main", "tiny-ft-untied", "tiny-vocab-4k")
    }


@pytest.fixture
def picture():
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle((20, 10, 90, 60), fill="red")
    return image


@pytest.mark.parametrize("name", ["tiny-main", "tiny-ft-untied", "tiny-vocab-4k"])
def test_pipeline_answers_about_a_picture(directories, picture, name):
    pipe = pipeline("image-text-to-text", model=str(directories[name]))
    settings = {"max_new_tokens": 8}
    (answer,) = pipe(images=picture, text="<CAPTION>", return_full_text=False, generate_kwargs=settings)
    assert answer["input_text"] == "<CAPTION>"
    processor = AutoProcessor.from_pretrained(directories[name])
    model = AutoModelForImageTextToText.from_pretrained(directories[name])
    ids = model.generate(
        **processor(text="<CAPTION>", images=picture, return_tensors="pt").to(model.dtype), **settings
    )
    assert answer["generated_text"] == processor.batch_decode(ids, skip_special_tokens=True)[0]


class Writes(torch.nn.Module):
    """A head that writes the given ids, whatever the decoder thinks."""

    def __init__(self, ids: list[int], rows: int) -> None:
        super().__init__()
        self.ids, self.rows, self.step = ids, rows, 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*hidden_states.shape[:-1], self.rows), -100.0)
        logits[..., self.ids[min(self.step, len(self.ids) - 1)]] = 100.0
        self.step += 1
        return logits


@pytest.mark.parametrize(
    ("task", "written", "expected"),
    [
        ("<OD>", "dog<loc_100><loc_250><loc_500><loc_999>", {"bboxes": [[12, 20, 60, 79]], "labels": ["dog"]}),
        (
            "<OCR_WITH_REGION>",
            "sign<loc_0><loc_0><loc_500><loc_0><loc_500><loc_500><loc_0><loc_500>",
            {"quad_boxes": [[0, 0, 60, 0, 60, 40, 0, 40]], "labels": ["sign"]},
        ),
        (
            "<CAPTION_TO_PHRASE_GROUNDING>",
            "a dog<loc_100><loc_250><loc_500><loc_999>it<loc_1><loc_1><loc_2><loc_2>",
            {"bboxes": [[12, 20, 60, 79]], "labels": ["a dog"]},
        ),
    ],
)
def test_generated_ids_become_boxes_in_pixels(directories, picture, task, written, expected):
    processor = AutoProcessor.from_pretrained(directories["tiny-main"])
    model = AutoModelForImageTextToText.from_pretrained(directories["tiny-main"], dtype=torch.float32).eval()
    ids = processor.tokenizer(written, add_special_tokens=False).input_ids
    model.lm_head = Writes([0, *ids, 2], model.config.text_config.vocab_size)
    text = task + ("a dog" if "PHRASE" in task else "")
    inputs = processor(text=text, images=picture, return_tensors="pt")
    generated = model.generate(
        **inputs, max_new_tokens=40, max_length=None, num_beams=1, no_repeat_ngram_size=0, early_stopping=None
    )
    raw = processor.batch_decode(generated, skip_special_tokens=False)[0]
    answer = processor.post_process_generation(raw, task=task, image_size=SIZE)
    assert answer == {task: expected}
    exact = Florence2OriginalProcessor.from_pretrained(directories["tiny-main"])
    boxes = exact.post_process_generation(raw, task=task, image_size=SIZE)[task]
    key = next(name for name in boxes if name.endswith("boxes"))
    assert [[int(side) for side in box] for box in boxes[key]] == expected[key]


def test_grey_and_transparent_pictures_are_taken(directories, picture):
    processor = AutoProcessor.from_pretrained(directories["tiny-main"])
    for mode in ("L", "RGBA"):
        inputs = processor(text="<OD>", images=picture.convert(mode), return_tensors="pt")
        assert inputs.pixel_values.shape == (1, 3, 96, 96)


def test_untied_fork_keeps_both_matrices_through_loading_training_and_saving(original, directories, tmp_path):
    state = original("tiny-ft-untied").state()
    model = Florence2ForConditionalGeneration.from_pretrained(directories["tiny-ft-untied"])
    head, shared = model.lm_head.weight, model.model.language_model.shared.weight
    assert torch.equal(head, state[HEAD]) and torch.equal(shared, state[SHARED])
    assert model.model.language_model.encoder.embed_tokens.weight is shared
    image = model.config.image_token_id
    ids = torch.tensor([[image] * 17 + [0, 80, 72, 2]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(input_ids=ids, pixel_values=torch.ones(1, 3, 128, 128), labels=torch.tensor([[0, 5, 6, 2]])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(head, state[HEAD]) and not torch.equal(head, shared)
    model.save_pretrained(tmp_path / "saved")
    again = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.tie_word_embeddings is False
    assert torch.equal(again.lm_head.weight, head)
    assert torch.equal(again.model.language_model.shared.weight, shared)


def test_untied_fork_keeps_both_matrices_through_a_merge(original, directories):
    peft = pytest.importorskip("peft")
    state = original("tiny-ft-untied").state()
    model = Florence2ForConditionalGeneration.from_pretrained(directories["tiny-ft-untied"])
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert torch.equal(merged.model.language_model.shared.weight, state[SHARED])
    assert not torch.equal(merged.lm_head.weight, state[HEAD])


def test_appended_row_costs_what_the_documentation_says(original, tmp_path):
    """docs/florence2.md: rows of zeros shift the loss a little; a re-labelled id shifts nothing."""
    losses = {}
    for how in ("reuse", "append"):
        out = convert(original("tiny-main").folder, tmp_path / how, None, image_token=how).directory
        model = Florence2ForConditionalGeneration.from_pretrained(out, dtype=torch.float64)
        ids = torch.tensor([[model.config.image_token_id] * 10 + [0, 80, 72, 2]])
        pixels = torch.linspace(-1, 1, 3 * 96 * 96).reshape(1, 3, 96, 96).double()
        losses[how] = float(model(input_ids=ids, pixel_values=pixels, labels=torch.tensor([[0, 5, 6, 2]])).loss)
    rows, added = 1381, 27
    # A row of zeros has the logit 0: the softmax's sum grows by 1 a row, out of about e^(log-sum-exp).
    assert 0 < losses["append"] - losses["reuse"] < 2 * added / rows


def test_command_converts_inspects_and_generates(original, picture, tmp_path):
    out, image = tmp_path / "out", tmp_path / "picture.png"
    picture.save(image)
    runner = CliRunner()
    result = runner.invoke(
        port_florence2, [str(original("tiny-main").folder), str(out), "--dtype", "float32", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["family"] == "florence2"
    result = runner.invoke(main, ["generate", str(out), str(image), "--task", "od", "--max-new-tokens", "4", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["prompt"] == "<OD>" and set(json.loads(answer["text"])) == {"bboxes", "labels"}
    result = runner.invoke(main, ["inspect", str(original("tiny-main").folder), "--json"])
    assert json.loads(result.output)["family"] == "florence2"
    result = runner.invoke(port_florence2, [str(tmp_path / "absent"), str(tmp_path / "none")])
    assert result.exit_code == 2 and "absent" in result.output
