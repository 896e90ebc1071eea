"""moondream2's tokenizer, prompts, pictures, answers and regions against the original's, by a directory that was
converted and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import moondream2_cases
import pytest
import torch
from golden_case import Case
from moondream2_cases import picture
from needs import has_checkpoint, has_data, judges, of_family
from transformers import AutoProcessor, pipeline

from weightport import modeling  # noqa: F401 - registers the classes
from weightport.api import convert, load_native
from weightport.modeling.moondream.generation_moondream import MoondreamReasoning
from weightport.modeling.moondream.image_processing_moondream import crop_grid, tile_grid

MOONDREAM = of_family(moondream2_cases.FAMILY)
TINY_DIFFERENCE = 1e-5
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
RELEASED_SIDE, RELEASED_MARGIN = 378, 56


def has_tokenizer(case: Case) -> bool:
    return has_data("companions/tokenizer.json")(case)


def of_2024(case: Case) -> bool:
    return "infer.input_ids" in case.tensor_names and not case.adapter


def of_2025(case: Case) -> bool:
    return "query.tokens.0" in case.tensor_names


def has_crops(case: Case) -> bool:
    return of_2024(case) and "pixel_values.0" in case.tensor_names


def has_one_view(case: Case) -> bool:
    return of_2024(case) and "pixel_values" in case.tensor_names


def has_variant(case: Case) -> bool:
    return "lora.logits" in case.tensor_names


def has_tiles(case: Case) -> bool:
    return of_2025(case) and bool(case.data("sizes.json"))


def has_small_pictures(case: Case) -> bool:
    return "image.0" in case.tensor_names and not case.large


def sized_crops(case: Case) -> bool:
    return has_crops(case) and bool(case.data("sizes.json"))


def names(case: Case, start: str) -> list[str]:
    return sorted(name for name in case.tensor_names if name.startswith(start))


def pictures(case: Case) -> list[Any]:
    return [picture(case, name) for name in names(case, "image.")]


@pytest.fixture
def processor(case: Case, converted: Callable[..., Path]) -> Any:
    return AutoProcessor.from_pretrained(converted(case))


@pytest.fixture
def model(case: Case, converted: Callable[..., Path]) -> Any:
    return load_native(converted(case), torch.float32)


# The tokenizer.


@judges(MOONDREAM, has_checkpoint, has_data("tokens.json"))
def test_every_text_has_the_originals_ids(case: Case, processor: Any) -> None:
    stored = case.data("tokens.json")
    for text, ids in zip(stored["strings"], stored["ids"]):
        # The original spells the placeholder out, which stands for a picture here.
        parts = text.split("<image>")
        found = [processor.tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in parts]
        if len(parts) == 1:
            assert found[0] == ids, text
        else:
            assert ids[len(ids) - len(found[-1]) :] == found[-1], text


@judges(MOONDREAM, has_checkpoint, has_data("tokens.json"))
def test_ids_decode_to_the_originals_text(case: Case, processor: Any) -> None:
    stored = case.data("tokens.json")
    for ids, text in zip(stored["ids"], stored["decoded_skip_special"]):
        assert processor.decode(ids, skip_special_tokens=True) == text


@judges(MOONDREAM, has_checkpoint, has_tokenizer)
def test_placeholder_is_behind_every_token_and_inside_the_embedding(case: Case, processor: Any, model: Any) -> None:
    assert processor.image_token_id == len(processor.tokenizer) - 1 == model.config.image_token_id
    assert processor.image_token_id < model.get_input_embeddings().num_embeddings


# Pictures.


@pytest.mark.pillow13
@judges(MOONDREAM, has_one_view)
def test_pixels_of_one_view_are_the_originals(case: Case, processor: Any) -> None:
    images = processor.image_processor
    found = images(pictures(case), return_tensors="pt")["pixel_values"]
    assert torch.equal(found, case.tensors["pixel_values"])
    for name in names(case, "extra_image."):
        wanted = case.tensors[name.replace("image", "pixels")]
        assert torch.equal(images(picture(case, name), return_tensors="pt")["pixel_values"][0], wanted)


@pytest.mark.pillow13
@judges(MOONDREAM, has_crops)
def test_pixels_of_crops_are_the_originals(case: Case, processor: Any) -> None:
    found = processor.image_processor(pictures(case), return_tensors="pt")
    for row, (views, (rows, columns)) in enumerate(zip(found["pixel_values"], found["image_grids"].tolist())):
        wanted = case.tensors[f"pixel_values.{row}"]
        crops = views[1 : 1 + rows * columns] if rows else views[:1]
        side, shape = crops.shape[-1], (max(rows, 1), max(columns, 1))
        whole = crops.unflatten(0, shape).permute(2, 0, 3, 1, 4).reshape(3, shape[0] * side, shape[1] * side)
        assert torch.equal(whole, wanted)
        assert not views[1 + rows * columns :].any()


@judges(MOONDREAM, sized_crops)
def test_every_size_of_picture_has_the_originals_crops(case: Case) -> None:
    for width, height, *wanted in case.data("sizes.json")["rows"]:
        rows, columns = crop_grid(height, width, RELEASED_SIDE)
        assert [rows * RELEASED_SIDE, columns * RELEASED_SIDE] == wanted, (width, height)


@judges(MOONDREAM, has_tiles)
def test_every_size_of_picture_has_the_originals_tiles(case: Case) -> None:
    window = RELEASED_SIDE - 2 * RELEASED_MARGIN
    for width, height, rows, columns, crops in case.data("sizes.json")["rows"]:
        found = tile_grid(height - 2 * RELEASED_MARGIN, width - 2 * RELEASED_MARGIN, window, 12)
        assert found == (rows, columns), (width, height)
        assert 1 + rows * columns == crops


@pytest.mark.pillow13
@judges(MOONDREAM, of_2025)
def test_pixels_of_tiles_are_the_originals(case: Case, processor: Any) -> None:
    found = processor.image_processor(pictures(case), return_tensors="pt")
    for row, views in enumerate(found["pixel_values"]):
        wanted = case.tensors[f"pixel_values.{row}"]
        assert torch.equal(views[: len(wanted)], wanted)
        assert found["image_grids"][row].tolist() == case.tensors[f"tiling.{row}"].tolist()


# Prompts.


@judges(MOONDREAM, of_2024)
def test_batch_of_questions_is_the_originals(case: Case, processor: Any) -> None:
    texts = [processor.prompt("query", question) for question in case.spec["reference"]["prompts"]]
    found = processor(images=pictures(case), text=texts, return_tensors="pt")
    wanted = case.tensors["infer.input_ids"]
    assert torch.equal(found["input_ids"].masked_fill(found["input_ids"] == processor.image_token_id, -1), wanted)
    assert torch.equal(found["attention_mask"], case.tensors["infer.attention_mask"].long())


@judges(MOONDREAM, of_2025)
def test_questions_of_2025_are_the_originals(case: Case, processor: Any) -> None:
    for row, question in enumerate(case.spec["reference"]["prompts"]):
        text = processor.prompt("query", question)
        found = processor(images=pictures(case)[row], text=text, return_tensors="pt")["input_ids"][0]
        wanted = case.tensors[f"query.tokens.{row}"]
        assert torch.equal(found[-len(wanted) :], wanted)
        assert set(found[1 : -len(wanted)].tolist()) == {processor.image_token_id}


@judges(MOONDREAM, of_2024)
def test_chat_is_the_original_history(case: Case, processor: Any) -> None:
    said = case.spec["reference"]["strings"]["chat_history"]
    prompt = processor.prompt("query", "What is this?", history=[("first?", "yes")])
    assert prompt == f"<image>\n\n{said}Question: What is this?\n\nAnswer:"
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "first?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}]},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == prompt


@judges(MOONDREAM, of_2025)
def test_chat_of_2025_is_its_query(case: Case, processor: Any) -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many coins?"}]}
    assert processor.apply_chat_template([turn]) == processor.prompt("query", "How many coins?")


# Answers.


def generated(processor: Any, model: Any, image: Any, text: str, length: int) -> str:
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, **GREEDY, max_new_tokens=length)
    return processor.answers(ids, inputs)[0]


@pytest.mark.pillow13
@judges(MOONDREAM, of_2024)
def test_answers_are_the_originals(case: Case, processor: Any, model: Any) -> None:
    stated = case.spec["reference"]
    length = stated["generation"]["max_new_tokens"]
    for row, question in enumerate(stated["prompts"]):
        answer = generated(processor, model, pictures(case)[row], processor.prompt("query", question), length)
        assert answer == stated["strings"]["greedy"][row].strip()
    chat = processor.prompt("query", "What is this?", history=[("first?", "yes")])
    assert generated(processor, model, pictures(case)[0], chat, length) == stated["strings"]["chat"].strip()


@judges(MOONDREAM, of_2025)
def test_answers_and_captions_of_2025_are_the_originals(case: Case, processor: Any, model: Any) -> None:
    stated = case.spec["reference"]
    length = stated["generation"]["max_new_tokens"]
    for row, question in enumerate(stated["prompts"]):
        inputs = processor(images=pictures(case)[row], text=processor.prompt("query", question), return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=length, do_sample=False, temperature=1.0, top_p=1.0, top_k=50
            )
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
        assert text.removesuffix("<|endoftext|>") == stated["strings"]["query"][row]
    short = generated(processor, model, pictures(case)[0], processor.prompt("caption", "short"), 8)
    assert short == stated["strings"]["caption_short"].strip()


@judges(MOONDREAM, of_2025)
def test_boxes_and_points_are_the_originals(case: Case, processor: Any, model: Any) -> None:
    stated = case.spec["reference"]["strings"]
    for task, image, text, key in (("detect", 0, "coin", "objects"), ("point", 1, "bill", "points")):
        inputs = processor(images=pictures(case)[image], text=processor.prompt(task, text), return_tensors="pt")
        wanted = stated[task][key]
        found = getattr(model, task)(**inputs, max_objects=len(wanted))
        assert len(found) == len(wanted)
        for own, theirs in zip(found, wanted):
            assert own == pytest.approx(theirs, abs=TINY_DIFFERENCE)


@judges(MOONDREAM, of_2025)
def test_reasoned_query_has_the_thinking_token_and_thoughts_point_at_places(
    case: Case, processor: Any, model: Any
) -> None:
    ids = case.spec["config"]["tokenizer"]
    prompt = processor.prompt("query", case.spec["reference"]["prompts"][0], reasoning=True)
    inputs = processor(images=pictures(case)[0], text=prompt, return_tensors="pt")
    # The suffix stands once there, and again before the answer; without reasoning it stands twice.
    asked = case.tensors["query.tokens.0"].tolist()[: -len(ids["templates"]["query"]["suffix"])]
    assert inputs["input_ids"][0].tolist()[-len(asked) - 1 :] == [*asked, ids["thinking_id"]]
    found = model.reason(**inputs, do_sample=False, max_new_tokens=10)
    assert not {ids["eos_id"], ids["size_id"]} & set(found.reasoning_ids[1:])
    assert ids["answer_id"] not in found.answer_ids[1:] and processor.reasoned(found)["answer"]

    words = [processor.text_ids(text) for text in ("one", " two", " three")]
    start, end, coord = ids["start_ground_points_id"], ids["end_ground_id"], ids["coord_id"]
    said = MoondreamReasoning(
        [*words[0], start, *words[1], coord, coord, coord, coord, end, coord, *words[2]],
        [0.25, 0.5, 0.75, 0.125, 0.9],
        processor.text_ids(" yes"),
    )
    assert processor.reasoned(said) == {
        "reasoning": {
            "text": "one two three",
            "grounding": [{"start_idx": 3, "end_idx": 7, "points": [(0.25, 0.5), (0.75, 0.125)]}],
        },
        "answer": " yes",
    }


@judges(MOONDREAM, has_variant)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_variant_computes_what_the_original_did_with_it(
    case: Case, rebuilt: Callable[[Case], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Merged as usual, with `out_proj`'s pair in the projection, the logits are 3.3 off."""
    original, out = rebuilt(case), tmp_path / "out"
    convert({"checkpoint": original, "variant": original.parent / "lora_final.pt"}, out, dtype=dtype)
    processor, model = AutoProcessor.from_pretrained(out), load_native(out, dtype)
    text = processor.prompt("query", case.spec["reference"]["prompts"][0])
    inputs = processor(images=pictures(case)[0], text=text, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        found = model(**inputs).logits[0, -4:]
    # Rotary tables differ by their last float32 bits, in a run of float64 too.
    suffix, allowed = (".f64", 1e-7) if dtype == torch.float64 else ("", TINY_DIFFERENCE)
    assert float((found - case.tensors[f"lora.logits{suffix}"].reshape(found.shape)).abs().max()) <= allowed


@judges(MOONDREAM, of_2025)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_region_head_computes_what_the_original_did(case: Case, converted: Any, dtype: torch.dtype) -> None:
    head = load_native(converted(case), dtype).region_head
    suffix, allowed = (".f64", 1e-7) if dtype == torch.float64 else ("", TINY_DIFFERENCE)
    state = case.tensors["query.hidden.0"][:, -1:].to(dtype)
    with torch.no_grad():
        found = {
            "encode_coordinate": head.encode_coordinate(case.tensors["region.coord_in"].to(dtype)),
            "encode_size": head.encode_size(case.tensors["region.size_in"].to(dtype)),
        }
        if dtype == torch.float32:
            # The float64 references follow from float64 states.
            found["decode_coordinate"] = head.coordinate_logits(state)
            found["decode_size"] = head.size_logits(state)[0, 0]
    for name, value in found.items():
        assert float((value - case.tensors[f"region.{name}{suffix}"]).abs().max()) <= allowed, name


@judges(MOONDREAM, has_small_pictures)
def test_converted_directory_answers_through_the_pipeline(case: Case, converted: Callable[..., Path]) -> None:
    answering = pipeline("image-text-to-text", model=str(converted(case)))
    said = [{"type": "image", "image": pictures(case)[0]}, {"type": "text", "text": "What is this?"}]
    turn = {"role": "user", "content": said}
    found = answering(text=[turn], max_new_tokens=4, return_full_text=False)
    assert isinstance(found[0]["generated_text"], str)
