"""Moondream's processor: prompts of each period, placeholders, padding, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

from golden import materialize  # noqa: E402

from weightport.families.moondream2.companions import LANCZOS, templates_of  # noqa: E402
from weightport.families.moondream2.revisions import NAMES, revision_named  # noqa: E402
from weightport.families.moondream2.tokenizer import build_tokenizer, image_token_id, read_vocabulary  # noqa: E402
from weightport.modeling.moondream.image_processing_moondream import MoondreamImageProcessor  # noqa: E402
from weightport.modeling.moondream.processing_moondream import MoondreamProcessor  # noqa: E402

PICTURE = Image.new("RGB", (40, 30), "red")
PLACES = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for year, case in (("2024", "tiny-2024-04-02"), ("2025", "tiny-2025-06-21")):
        found[year] = tmp_path_factory.mktemp(year) / "original"
        materialize(GOLDEN / "cases/moondream2" / case, found[year])
    return found


def processor_of(name: str, folders: dict[str, Path], **changes: Any) -> MoondreamProcessor:
    """The processor that a conversion makes of this revision, for pictures of 28 pixels."""
    revision = revision_named(name)
    vocabulary = read_vocabulary(folders["2025" if revision.own_tokenizer else "2024"])
    images = MoondreamImageProcessor(
        size={"height": 28, "width": 28}, views=revision.merge, overlap_margin=0, image_seq_length=PLACES,
        normalize_dtype=revision.normalize_dtype, **({"resample": LANCZOS} if revision.merge == "tiles" else {}),
    )  # fmt: skip
    settings = {
        "templates": templates_of(revision, {}, 51200), "question_space": revision.question_space,
        "image_texts": revision.image_texts, "answer_space": revision.answer_space, "end_text": revision.end_text,
        "clean_spaces": revision.keys == "2024",
    }  # fmt: skip
    return MoondreamProcessor(
        images, build_tokenizer(vocabulary, image_token_id(vocabulary), 2048), **settings | changes
    )


@pytest.fixture(params=["2024-04-02", "2025-06-21"])
def processor(request, folders) -> MoondreamProcessor:
    return processor_of(request.param, folders)


# Prompts, as the facts of each revision have them.


@pytest.mark.parametrize("name", NAMES)
def test_question_is_laid_out_as_the_revision_does(name: str, folders) -> None:
    processor = processor_of(name, folders)
    tokenizer, image = processor.tokenizer, [processor.image_token_id] * PLACES

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    found = processor(images=PICTURE, text=processor.prompt("query", "How many?"))["input_ids"]
    start = [tokenizer.bos_token_id]
    if name in ("2024-03-04", "2024-03-05", "2024-03-06"):
        # The words around the picture are text: "<image>" is no token of theirs.
        words = [piece for part in ("<", "image>") for piece in ids(part)]
        end = " " if name == "2024-03-04" else ""
        wanted = [*start, *words, *image, *ids("</image>"), *ids(f"\n\nQuestion: How many?\n\nAnswer:{end}")]
    elif name < "2024-09" and name != "2024-late":
        wanted = [*start, *image, *ids("\n\nQuestion: How many?\n\nAnswer:")]
    elif name == "2025-06-21":
        wanted = [*start, *image, 1, 15381, 2, *ids("How many?"), 3, 3]
    else:
        wanted = [*start, *image, 198, 198, 24361, 25, *ids(" How many?"), 198, 198, 33706, 25]
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "length", "wanted"),
    [
        ("2024-08-26", "short", "\n\nShort caption:"),
        ("2024-08-26", "normal", "\n\nCaption:"),
        ("2025-01-09", "short", [198, 198, 16438, 8305, 25]),
        ("2025-01-09", "normal", [198, 198, 24334, 1159, 25]),
        ("2025-04-14", "long", [198, 198, 14617, 8305, 25]),
        ("2025-06-21", "short", [1, 32708, 2, 12492, 3]),
        ("2025-06-21", "normal", [1, 32708, 2, 6382, 3]),
        ("2025-06-21", "long", [1, 32708, 2, 4059, 3]),
    ],
)
def test_caption_is_asked_for_as_the_revision_does(name: str, length: str, wanted: Any, folders) -> None:
    processor = processor_of(name, folders)
    found = processor(images=PICTURE, text=processor.prompt("caption", length))["input_ids"][1 + PLACES :]
    assert found == (processor.text_ids(wanted) if isinstance(wanted, str) else wanted)


@pytest.mark.parametrize("name", NAMES)
def test_captions_of_august_2024_have_settings_of_their_own(name: str, folders) -> None:
    own = processor_of(name, folders, caption_settings=dict(revision_named(name).caption_settings))
    august = {"repetition_penalty": 1.2, "max_new_tokens": 512}
    assert own.settings("caption") == (august if name == "2024-08-26" else {}) and own.settings("query") == {}


@pytest.mark.parametrize(
    ("name", "task", "before", "behind"),
    [
        ("2025-01-09", "detect", [198, 198, 47504, 25], [628]),
        ("2025-04-14", "point", [198, 198, 12727, 25], [628]),
        ("2025-06-21", "detect", [1, 7235, 476, 2], [3]),
        ("2025-06-21", "point", [1, 2581, 2], [3]),
    ],
)
def test_object_is_looked_for_as_the_revision_does(
    name: str, task: str, before: list[int], behind: list[int], folders
) -> None:
    processor = processor_of(name, folders)
    found = processor(images=PICTURE, text=processor.prompt(task, "coin"))["input_ids"][1 + PLACES :]
    assert found == [*before, *processor.text_ids(" coin"), *behind]


def test_answers_of_march_2024_end_in_words(folders) -> None:
    processor = processor_of("2024-03-13", folders)
    for text in (" two coins<END>", " two coins<END", " two coins<", " two coins"):
        assert processor.answer(processor.text_ids(text)) == "two coins"
    assert processor_of("2024-04-02", folders).answer(processor.text_ids(" two<END>")) == "two<END>"


def test_boxes_and_points_come_in_pixels(processor) -> None:
    found = [{"x_min": -0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 1.0}, {"x": 0.5, "y": 0.25}]
    assert processor.in_pixels(found, (200, 80)) == [
        {"x_min": -20.0, "y_min": 20.0, "x_max": 100.0, "y_max": 80.0}, {"x": 100.0, "y": 20.0}
    ]  # fmt: skip


def test_batch_is_padded_on_the_left_and_masked(processor) -> None:
    texts = [processor.prompt("query", text) for text in ("How many coins are there?", "What?")]
    found = processor(images=[PICTURE, PICTURE], text=texts, return_tensors="pt")
    mask = found["attention_mask"]
    assert mask[0].all() and not mask[1].all() and mask[1].diff().min() == 0
    assert (found["input_ids"][1][mask[1] == 0] == processor.tokenizer.pad_token_id).all()
    assert (found["input_ids"] == processor.image_token_id).sum(1).tolist() == [PLACES, PLACES]


def test_prompt_without_a_picture_is_text(processor) -> None:
    found = processor(text="What is a coin?")
    assert processor.image_token_id not in found["input_ids"] and "pixel_values" not in found


# What is refused.


@pytest.mark.parametrize(
    ("images", "text", "said"),
    [
        ([PICTURE, PICTURE], "<image><image>\n\nWhat?", "has one <image> at most, found 2 in '<image><image>"),
        (PICTURE, "What?", r"Found 1 picture\(s\) for 0 <image> in 1 text\(s\): write one <image>"),
        (None, "<image>\n\nWhat?", r"Found 0 picture\(s\) for 1 <image> in 1 text"),
        ([PICTURE], ["<image>a", "<image>b"], r"Found 1 picture\(s\) for 2 <image> in 2 text"),
        (None, None, "needs images, text or both"),
        (PICTURE, 5, "text is a string or a list of strings"),
    ],
    ids=["two images", "no image", "no picture", "one picture for two", "nothing", "number"],
)
def test_pictures_and_places_that_do_not_agree_are_refused(processor, images: Any, text: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        processor(images=images, text=text)


def test_prompt_that_is_too_long_is_refused_and_not_cut(processor) -> None:
    text = processor.prompt("query", "How many coins?")
    whole = processor(images=PICTURE, text=text)["input_ids"]
    assert processor(images=PICTURE, text=text, truncation=True, max_length=len(whole))["input_ids"] == whole
    with pytest.raises(ValueError, match=rf"has {len(whole)} tokens, more than max_length \({len(whole) - 1}\)"):
        processor(images=PICTURE, text=text, truncation=True, max_length=len(whole) - 1)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("2024-04-02", ("detect", "coin"), "revisions of 2024 have no prompt for 'detect'"),
        ("2024-04-02", ("caption", "long"), "revisions of 2024 have no prompt for 'caption' 'long'"),
        ("2025-01-09", ("caption", "long"), r"This revision has no prompt for 'caption' \(long\)"),
        ("2025-06-21", ("caption", "huge"), "A caption is short, normal, long, not 'huge'"),
        ("2025-06-21", ("dance", ""), "There is no task 'dance'"),
        ("2025-06-21", ("detect", " "), "'detect' asks for an object: name what"),
    ],
)
def test_task_that_a_revision_does_not_have_is_refused(name: str, asked: tuple, said: str, folders) -> None:
    with pytest.raises(ValueError, match=said):
        processor_of(name, folders).prompt(*asked)


@pytest.mark.parametrize("name", ["2024-04-02", "2025-04-14"])
def test_only_the_last_revision_reasons(name: str, folders) -> None:
    with pytest.raises(ValueError, match="only by the revision of 2025-06-21"):
        processor_of(name, folders).prompt("query", "Why?", reasoning=True)
    with pytest.raises(ValueError, match="Only the revision of 2025-06-21 reasons"):
        processor_of(name, folders).reasoned(None)
    with pytest.raises(ValueError, match="Only a query is reasoned about"):
        processor_of("2025-06-21", folders).prompt("caption", "short", reasoning=True)


def test_history_of_2025_is_refused(folders) -> None:
    with pytest.raises(ValueError, match="answer a question without earlier ones"):
        processor_of("2025-06-21", folders).prompt("query", "And?", history=[("a", "b")])


# Pictures of any kind.


@pytest.mark.parametrize("views", ["none", "grid", "tiles"])
def test_arrays_and_pictures_of_any_mode_give_the_same_pixels(views: str) -> None:
    images = MoondreamImageProcessor(size={"height": 28, "width": 28}, views=views, overlap_margin=0)
    array = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    grey = array[..., 0]
    transparent = Image.fromarray(np.dstack([array, grey]))
    same = [Image.fromarray(array), array, array.transpose(2, 0, 1), transparent]
    found = [images(each, return_tensors="np")["pixel_values"] for each in same]
    assert all(np.array_equal(found[0], each) for each in found[1:])
    greys = [images(each, return_tensors="np")["pixel_values"] for each in (Image.fromarray(grey), grey)]
    assert np.array_equal(*greys) and not np.array_equal(greys[0], found[0])
