from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor

BOX, SIZE = [10, 20, 300, 470], (640, 480)


def tokens(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_one_call_gives_all_that_the_model_takes(english, image):
    inputs = english(images=image, text=english.prompt("caption"), return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids", "patch_masks", "pixel_values"]
    assert sorted(inputs) == sorted(english.model_input_names)
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["patch_masks"].dtype == torch.bool
    assert inputs["input_ids"].tolist() == [english.tokenizer(" what does the image describe?").input_ids]


def test_a_sample_without_image_is_masked_and_zero(chinese, image):
    for missing in (None, []):
        inputs = chinese(images=[image, missing, image], text=["图", "图片", "狗"], padding=True, return_tensors="pt")
        assert inputs["patch_masks"].tolist() == [True, False, True]
        assert inputs["pixel_values"].shape == (3, 3, 32, 32)
        assert inputs["pixel_values"][1].abs().max() == 0
        torch.testing.assert_close(inputs["pixel_values"][0], inputs["pixel_values"][2])


def test_texts_alone_have_no_pixels(english):
    assert sorted(english(text=" what")) == ["attention_mask", "input_ids"]
    assert "patch_masks" not in english(text=[" what"], images=[None], return_tensors="pt")


def test_one_text_serves_several_images(english, image):
    inputs = english(images=[image, image], text=" what", return_tensors="pt")
    assert inputs["input_ids"].shape[0] == inputs["pixel_values"].shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one of"),
        ({"text": 7}, "a string or a list of strings"),
        ({"text": ["a", None]}, "a string or a list of strings"),
        ({"text": "a", "decoder_prompt": "source"}, "decoder_prompt is one of"),
        ({"text_target": "a", "decoder_prompt": "src"}, "give text too"),
        ({"text": ["a", "b"], "text_target": "a", "decoder_prompt": "src"}, "1 targets for 2 texts"),
        ({"text": ["a", "bb"], "decoder_prompt": "src"}, "differ in length"),
    ],
)
def test_wrong_input_is_told(english, arguments, message):
    with pytest.raises(ValueError, match=message):
        english(**arguments)


def test_texts_and_images_that_do_not_pair_up_are_refused(english, image):
    with pytest.raises(ValueError, match="2 texts for 1 images"):
        english(images=image, text=["a", "b"])
    with pytest.raises(ValueError, match="one image a sample, found 2"):
        english(images=[[image, image]], text="a")


def test_labels_end_with_eos_and_are_ignored_beyond_it(english):
    inputs = english(text=[" a", " b"], text_target=[" the thing", " the"], return_tensors="pt", padding=True)
    rows = [english.tokenizer(target, add_special_tokens=False).input_ids for target in (" the thing", " the")]
    longest = max(map(len, rows)) + 1
    assert inputs["labels"].tolist() == [[*row, 2] + [-100] * (longest - len(row) - 1) for row in rows]


def test_targets_are_cleaned_as_the_original_cleans_them(english, chinese):
    assert english.target("caption", " A dog, on the-street! ") == " A dog on thestreet"
    assert english.target("region_caption", "A Dog") == " a dog"
    assert english.target("vqa", "yes") == " yes"
    assert chinese.target("ocr", "ＡＢ") == " ab"
    assert len(english.target("caption", "w " * 50).split()) == 30
    bins = english.boxes_to_bins(BOX, SIZE)
    assert english.target("grounding", bins) is bins


@pytest.mark.parametrize("decoder_prompt", ["src", "prev_output"])
def test_decoder_prompts_repeat_the_text_and_are_no_targets(english, decoder_prompt):
    # vqa_gen_dataset.py: prev_output_tokens, and target = prev_output_tokens[1:] + eos with pads before the answer.
    source = english.tokenizer(" what").input_ids
    answer = english.tokenizer(" the", add_special_tokens=False).input_ids
    inputs = english(text=[" what"], text_target=[" the"], decoder_prompt=decoder_prompt, return_tensors="pt")
    prompt = source if decoder_prompt == "src" else source[:-1]
    assert inputs["decoder_input_ids"].tolist() == [prompt + answer]
    assert inputs["labels"].tolist() == [[-100] * (len(prompt) - 1) + answer + [2]]
    assert inputs["labels"].shape == inputs["decoder_input_ids"].shape
    generating = english(text=" what", decoder_prompt=decoder_prompt, return_tensors="pt")
    assert generating["decoder_input_ids"].tolist() == [prompt]


def test_symbols_mean_themselves_only_where_the_processor_wrote_them(english, chinese):
    for processor in (english, chinese):
        bins = processor.boxes_to_bins(BOX, SIZE)
        # 32 pixels of 512: the 1000 bins end at 62.4.
        assert bins == "<bin_1> <bin_3> <bin_29> <bin_61>"
        expected = processor.tokenizer.convert_tokens_to_ids(bins.split())
        assert processor(text_target=bins)["labels"] == [[*expected, 2]]
        typed = str(bins)[:]
        assert processor(text_target="x" + typed)["labels"][0][1:-1] != expected
        assert processor(text_target=typed, parse_symbols=True)["labels"] == [[*expected, 2]]
        processor.parse_symbols = True
        assert processor(text_target=typed)["labels"] == [[*expected, 2]]
        assert processor(text=bins, parse_symbols=False)["input_ids"] == processor.tokenizer(str(bins))["input_ids"]


def test_region_captions_ask_with_bins_right_after_the_prompt(english):
    ids = english(text=english.prompt("region_caption", box=BOX, image_size=SIZE))["input_ids"]
    prefix = english.tokenizer("  what does the region describe? region:").input_ids
    assert ids[: len(prefix) - 1] == prefix[:-1]
    assert tokens(english, ids[len(prefix) - 1 :]) == ["<bin_1>", "<bin_3>", "<bin_29>", "<bin_61>", "</s>"]


def test_masks_stand_in_infilling_prompts(english):
    ids = english(text=english.prompt("text_infilling", text="the <mask> thing"))["input_ids"]
    at = tokens(english, ids).index("<mask>")
    assert english.tokenizer.decode(ids[:at]).endswith('of " the')
    assert english.tokenizer.decode(ids[at + 1 :]).startswith(" thing")


def test_the_language_is_the_vocabularys(english, chinese):
    assert (english.language, chinese.language) == ("en", "zh")
    assert chinese.prompt("caption") == "图片描述了什么内容?"
    assert chinese.prompt("caption", language="en") == " what does the image describe?"
    assert english.num_bins == chinese.num_bins == 1000


def test_boxes_come_back_from_ids_and_text(english):
    bins = english.boxes_to_bins([BOX, BOX], SIZE)
    ids = english.tokenizer.convert_tokens_to_ids(bins.split())
    for answer in (bins, [0, *ids, 2], torch.tensor([0, *ids, 2])):
        boxes = english.bins_to_boxes(answer, SIZE)
        assert boxes.shape == (2, 4)
        # 62.4 bins over the image: a bin is 10.25 pixels wide and 7.7 high.
        np.testing.assert_allclose(boxes[0], BOX, atol=5.2)
    assert english.bins_to_boxes("none", SIZE).shape == (0, 4)


def test_answers_are_read_by_task(english, chinese):
    assert english.post_process_generation(" a dog ", "caption") == {"caption": "a dog"}
    grounding = english.post_process_generation("<bin_0><bin_0><bin_31><bin_31>", "grounding", SIZE)
    np.testing.assert_allclose(grounding["grounding"]["boxes"], [[0, 0, 317.7, 238.3]], atol=0.1)
    detection = english.post_process_generation("<bin_0><bin_0><bin_1><bin_1> dog", "detection", SIZE)
    assert detection["detection"]["labels"] == ["dog"]
    assert english.post_process_generation("<code_3><code_7>", "image_generation") == {"image_generation": [3, 7]}
    with pytest.raises(ValueError, match="give image_size"):
        english.post_process_generation("<bin_0>", "grounding")


def test_chinese_joins_without_gluing_english_words(chinese):
    text = "一只 红 色 的 iphone 12 pro, 狗 。"
    assert chinese.post_process_generation(text, "caption") == {"caption": "一只红色的iphone 12 pro,狗。"}
    assert chinese.post_process_generation(text, "caption", join=False) == {"caption": text}
    ids = chinese.tokenizer("一只狗 the ing").input_ids
    assert chinese.decode(ids, skip_special_tokens=True) == "一 只 狗 the ing"
    assert chinese.batch_decode([ids], skip_special_tokens=True, join=True) == ["一只狗the ing"]


def test_a_chat_is_its_texts(english, chinese, image):
    question = {"type": "text", "text": "what does the image describe?"}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
    inputs = english.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    expected = english(images=image, text=english.prompt("caption"), return_tensors="pt")
    for name in expected:
        torch.testing.assert_close(inputs[name], expected[name])
    assert chinese.apply_chat_template([{"role": "user", "content": "图片"}]) == "图片"


def test_a_saved_processor_loads_and_holds_nothing_of_its_use(english, tmp_path, image):
    english(text=english.prompt("region_caption", box=BOX, image_size=SIZE))
    english.max_image_size = 256
    english.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert set(saved) == {"image_processor", "max_image_size", "processor_class"}
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(english)
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "saved")) is type(english.image_processor)
    assert loaded.max_image_size == 256
    assert loaded.chat_template == english.chat_template
    torch.testing.assert_close(
        loaded(images=image, return_tensors="pt")["pixel_values"],
        english(images=image, return_tensors="pt")["pixel_values"],
    )


REMOTE = """
import sys
from transformers import AutoImageProcessor, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert "weightport" not in sys.modules
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert type(images).__name__ == type(processor.image_processor).__name__ == "OFAImageProcessor"
print(processor(text=processor.prompt("region_caption", box=[10, 20, 300, 470], image_size=(640, 480)))["input_ids"])
"""


def test_the_files_beside_the_weights_are_enough_without_the_package(english, tmp_path, monkeypatch):
    # What save_pretrained does for a class that is registered for its Auto class: code copied, auto_map written.
    monkeypatch.setattr(type(english), "_auto_class", "AutoProcessor")
    monkeypatch.setattr(type(english.image_processor), "_auto_class", "AutoImageProcessor")
    english.save_pretrained(tmp_path / "remote")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "remote")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    expected = english(text=english.prompt("region_caption", box=BOX, image_size=SIZE))["input_ids"]
    assert run.stdout.strip().splitlines()[-1] == str(expected)
