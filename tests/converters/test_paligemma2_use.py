"""What a user does with a converted PaliGemma: pipelines, prompts, saving, commands, and what serving engines read."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from paligemma2_checkpoints import arrays, originals, write
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaForConditionalGeneration, pipeline

from weightport.api import convert
from weightport.cli import main
from weightport.converters.name_spaces import name_space

PROMPT = "<image>caption en"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return originals(tmp_path_factory)


@pytest.fixture(scope="module")
def directories(original, tmp_path_factory) -> dict[str, Path]:
    """Case name → its converted directory."""
    return {
        name: convert(original(name), tmp_path_factory.mktemp("use") / name).directory
        for name in ("tiny-gemma2", "tiny-gemma1", "tiny-bf16")
    }


@pytest.fixture
def picture() -> Image.Image:
    image = Image.new("RGB", (120, 80), "white")
    ImageDraw.Draw(image).rectangle((20, 10, 90, 60), fill="red")
    return image


@pytest.fixture
def silent(caplog: pytest.LogCaptureFixture):
    """Fails the test where anything warned, by Python's warnings or by a logger."""
    from transformers.utils import logging as of_transformers

    of_transformers.enable_propagation()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        yield
        said = [str(each.message) for each in caught if not issubclass(each.category, DeprecationWarning)]
        assert said + [record.getMessage() for record in caplog.records] == []
    of_transformers.disable_propagation()


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-gemma1", "tiny-bf16"])
def test_pipeline_answers_about_a_picture_without_a_warning(directories, picture, silent, name: str) -> None:
    pipe = pipeline("image-text-to-text", model=str(directories[name]))
    (answer,) = pipe(images=picture, text=PROMPT, return_full_text=False, generate_kwargs={"max_new_tokens": 8})
    processor = AutoProcessor.from_pretrained(directories[name])
    model = AutoModelForImageTextToText.from_pretrained(directories[name])
    inputs = processor(text=PROMPT, images=picture, return_tensors="pt").to(model.dtype)
    ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_chat_is_its_picture_and_its_text(directories, picture) -> None:
    processor = AutoProcessor.from_pretrained(directories["tiny-gemma2"])
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": "caption en"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = processor(text=PROMPT, images=picture, return_tensors="pt")
    assert torch.equal(batch["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-gemma1"])
def test_names_on_disk_stay_the_hubs_when_a_loaded_model_is_saved(directories, tmp_path: Path, name: str) -> None:
    model, found = AutoModelForImageTextToText.from_pretrained(directories[name], output_loading_info=True)
    assert isinstance(model, PaliGemmaForConditionalGeneration)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(each / "model.safetensors") for each in (directories[name], tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert not any("lm_head" in key for key in before)


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-gemma1"])
def test_every_name_on_disk_is_one_tensor_of_the_running_model(directories, name: str) -> None:
    stored = {key: tuple(tensor.shape) for key, tensor in load_file(directories[name] / "model.safetensors").items()}
    space = name_space(directories[name], stored)
    assert not space.unused and not space.permuted
    made = {key: pieces[0].stored for key, pieces in space.made_of.items() if len(pieces) == 1}
    assert set(made.values()) == set(stored)
    assert set(space.shapes) - set(made) == {"lm_head.weight"}


def test_attention_sees_the_whole_prompt_whatever_its_length(original, tmp_path: Path, picture) -> None:
    """With the published window, the tokens of a large picture are out of reach; the original has none."""
    whole = convert(original("tiny-gemma2"), tmp_path / "whole").directory
    cut = convert(original("tiny-gemma2"), tmp_path / "cut", sliding_window="8").directory
    found = []
    for directory in (whole, cut):
        processor = AutoProcessor.from_pretrained(directory)
        model = AutoModelForImageTextToText.from_pretrained(directory)
        batch = processor(text=PROMPT, images=picture, suffix="a red box on white", return_tensors="pt")
        with torch.no_grad():
            found.append(model(**batch).loss)
    assert not torch.allclose(*found)


def test_padded_rows_change_no_answer(original, directories, tmp_path: Path, picture) -> None:
    padded = convert(original("tiny-gemma2"), tmp_path / "padded", pad_vocab=True).directory
    texts = []
    for directory in (directories["tiny-gemma2"], padded):
        processor = AutoProcessor.from_pretrained(directory)
        model = AutoModelForImageTextToText.from_pretrained(directory)
        ids = model.generate(**processor(text=PROMPT, images=picture, return_tensors="pt"), max_new_tokens=8)
        texts.append(ids.tolist())
    assert texts[0] == texts[1]


def test_several_pictures_stand_before_the_text(directories, picture) -> None:
    processor = AutoProcessor.from_pretrained(directories["tiny-gemma2"])
    batch = processor(text="<image><image>compare", images=[[picture, picture]], return_tensors="pt")
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 2 * processor.image_seq_length
    assert batch["pixel_values"].shape[0] == 2


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_convert_try_and_export(original, tmp_path: Path, picture) -> None:
    picture.save(tmp_path / "picture.png")
    said = run("convert", original("tiny-trainstate"), tmp_path / "out", "--vocab", original("tiny-gemma2").parent)
    assert "PaliGemma 2 of width 40 at 42 px" in said and "optimizer state 236 kB, not read" in said
    assert "paligemma_tokenizer.model" in said
    said = run("generate", tmp_path / "out", tmp_path / "picture.png", "--prompt", PROMPT, "--max-new-tokens", "4")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    inputs = processor(text=PROMPT, images=picture, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert said.strip() == processor.decode(ids, skip_special_tokens=True).strip()
    run("export", tmp_path / "out", tmp_path / "back.npz")
    given = arrays(original("tiny-gemma2"))
    assert all((arrays(tmp_path / "back.npz")[name] == array).all() for name, array in given.items())


def test_dry_run_tells_the_plan_of_a_released_size_and_writes_nothing(original, tmp_path: Path) -> None:
    said = run("convert", original("tiny-gemma2"), tmp_path / "out", "--dry-run", "--final-softcap", "30")
    assert "34 tensors → 101" in said and not (tmp_path / "out").exists()


def test_part_of_the_towers_left_out_is_named(original, tmp_path: Path) -> None:
    given = arrays(original("tiny-gemma2"))
    path = write(tmp_path / "c.npz", given)
    result = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out"), "--drop", "params/img/head/bias"])
    assert result.exit_code == 1 and "left out on request, but the model cannot do without" in result.output
    assert json.dumps("img/head/bias").strip('"') in result.output
