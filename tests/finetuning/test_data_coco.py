"""COCO detection files: counting questions and boxes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_data import coco_document, draw, draw_coco, encoded

from weightport.errors import DataError, RecipeError
from weightport.finetuning.data import DataSettings, open_data

COUNTING = DataSettings()
DETECTION = DataSettings(form="detection")


def test_counting_answers_are_the_guides_json_without_absent_classes(tmp_path: Path) -> None:
    settings = DataSettings(what="currency", classes=("penny", "dime", "nickel"))
    samples = open_data(draw_coco(tmp_path), settings)
    assert [samples[i].suffix for i in range(3)] == [
        '{\n  "penny": 1\n}',
        '{\n  "penny": 1,\n  "dime": 1\n}',
        "{}",
    ]
    assert samples[1].suffix == json.dumps({"penny": 1, "dime": 1}, indent=2)
    assert samples[0].prefix == (
        "How many of each type of currency (penny, dime, nickel) are there? Respond in JSON format with the currency "
        "type as the key and an integer count as the value."
    )
    assert samples[1].references == (samples[1].suffix,) and samples[1].objects is None
    picture = samples[1].picture
    assert picture is not None and picture.key == "1.png" and picture.read().tobytes() == draw(1).tobytes()
    assert samples[1].place == f"{tmp_path}/_annotations.coco.json, image 1 (1.png)"


def test_classes_are_the_files_in_its_order_without_roboflows_group(tmp_path: Path) -> None:
    samples = open_data(draw_coco(tmp_path), DataSettings(question="Count {classes} as {json}."))
    assert samples[0].prefix == "Count nickel, dime, penny as {json}."
    assert samples[1].suffix == json.dumps({"dime": 1, "penny": 1}, indent=2)


def test_a_group_with_objects_of_its_own_is_a_class(tmp_path: Path) -> None:
    document = coco_document()
    document["annotations"].append({"id": 99, "image_id": 2, "category_id": 0, "bbox": [1, 1, 2, 2]})
    assert json.loads(open_data(draw_coco(tmp_path, document), COUNTING)[2].suffix) == {"currency": 1}


def test_letters_beyond_ascii_stand_for_themselves(tmp_path: Path) -> None:
    document = coco_document()
    document["categories"][3]["name"] = "硬币"
    assert open_data(draw_coco(tmp_path, document), COUNTING)[0].suffix == '{\n  "硬币": 1\n}'


def test_boxes_are_corners_in_pixels_and_crowds_are_left_out(tmp_path: Path) -> None:
    document = coco_document()
    document["annotations"] += [
        {"id": 90, "image_id": 1, "category_id": 1, "bbox": [0, 0, 48, 32], "iscrowd": 1},
        {"id": 91, "image_id": 1, "category_id": 1, "bbox": [40.5, 20.25, 7.9, 11.8], "iscrowd": 0},
    ]
    samples = open_data(draw_coco(tmp_path, document), DETECTION)
    sample = samples[1]
    assert sample.objects is not None and sample.suffix == sample.prefix == "" and sample.references == ()
    assert sample.objects.labels == ("penny", "dime", "nickel")
    assert sample.objects.size == (48, 32)
    assert sample.objects.boxes[:2] == ((1, 2, 11, 7), (2, 2, 12, 7))
    # 40.5 + 7.9 and 20.25 + 11.8 pass the image's edge by rounding.
    assert sample.objects.boxes[2] == (40.5, 20.25, 48.0, 32.0)
    empty = samples[2].objects
    assert empty is not None and empty.labels == () and empty.boxes == ()


def test_classes_that_are_not_asked_for_are_no_objects(tmp_path: Path) -> None:
    samples = open_data(draw_coco(tmp_path), DataSettings(form="detection", classes=("penny",)))
    assert [sample.objects.labels for sample in (samples[i] for i in range(3)) if sample.objects] == [
        ("penny",),
        ("penny",),
        (),
    ]
    with pytest.raises(DataError, match=r"no category cent \(data\.classes\)\. Found: currency, nickel, dime, penny"):
        open_data(tmp_path, DataSettings(classes=("cent", "dime")))


@pytest.mark.parametrize("form", ["counting", "detection"])
def test_views_for_training_and_evaluation_and_pickles_agree(tmp_path: Path, form: str) -> None:
    settings = DataSettings(form=form, answer="each")
    samples = open_data(draw_coco(tmp_path), settings)
    grouped = pickle.loads(pickle.dumps(open_data(tmp_path, settings, grouped=True)))
    assert len(samples) == len(grouped) == 3
    for i in range(3):
        one, other = samples[i], grouped[i]
        assert (one.place, one.suffix, one.objects) == (other.place, other.suffix, other.objects)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("labels.json", "images"),
        ("valid/_annotations.coco.json", "valid"),
    ],
)
def test_images_are_found_where_coco_and_roboflow_keep_them(tmp_path: Path, annotations: str, images: str) -> None:
    for place in (annotations, images + "/x"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / annotations).write_text(json.dumps(coco_document()), "utf-8")
    for number in range(3):
        (tmp_path / images / f"{number}.png").write_bytes(encoded(number))
    assert len(open_data(tmp_path / annotations, COUNTING)) == 3
    (tmp_path / images).rename(tmp_path / "elsewhere")
    path = tmp_path / "elsewhere" / "_annotations.coco.json"
    path = path if path.exists() else tmp_path / annotations
    assert len(open_data(path, DataSettings(images=str(tmp_path / "elsewhere")))) == 3


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = coco_document()
    change(document)
    return document


# Annotation 1 is image 1's first.
BAD: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d["annotations"][1].update(category_id=7), r"\(1\.png\), annotation 1: the category 7 is not"),
    (lambda d: d["annotations"][1].update(category_id=[7]), r"the category \[7\] is not among .* 2 dime"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 0, 5]), r"annotation 1: the box .* has no area"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, -5]), "has no area"),
    (lambda d: d["annotations"][1].update(bbox=[40, 2, 20, 5]), "leaves the image of 48 x 32 pixels"),
    (lambda d: d["annotations"][1].update(bbox=[-5, 2, 20, 5]), "leaves the image of 48 x 32 pixels"),
    (lambda d: d["annotations"][1].update(bbox=[100, 100, 20, 5]), "leaves the image"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "Four numbers were expected"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, float("nan"), 3]), "Four numbers were expected"),
    (lambda d: d["annotations"][1].pop("bbox"), "Four numbers were expected"),
    (lambda d: d["images"][1].update(width=0), "width and height in pixels were expected, found 0 and 32"),
    (lambda d: d["images"][1].pop("height"), "found 48 and None"),
    (lambda d: d["images"][1].update(file_name="gone.png"), "the image 'gone.png' is not in"),
    (lambda d: d["images"][1].update(file_name="../1.png"), "leads out of the image folder"),
    (lambda d: d["images"][1].pop("file_name"), "the name of an image was expected, found null"),
]


@pytest.mark.parametrize(("change", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_image_or_box_is_named_or_its_image_skipped(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    path = draw_coco(tmp_path)
    path.write_text(json.dumps(changed(change)), "utf-8")
    with pytest.raises(DataError, match=rf"_annotations\.coco\.json, image 1 .*{reason}"):
        open_data(path, DETECTION)
    samples = open_data(path, DataSettings(form="detection", skip_bad=1))
    assert len(samples) == 2 and samples[1].objects is not None and samples[1].objects.labels == ()


def test_an_annotation_of_no_image_is_named(tmp_path: Path) -> None:
    document = changed(lambda d: d["annotations"][2].update(image_id=77))
    with pytest.raises(DataError, match=r"annotations\[2\]: no image has the id 77"):
        open_data(draw_coco(tmp_path, document), COUNTING)
    assert len(open_data(tmp_path, DataSettings(skip_bad=1))) == 3


def test_counting_needs_no_boxes_and_no_sizes(tmp_path: Path) -> None:
    document = coco_document()
    document["images"] = [{"id": image["id"], "file_name": image["file_name"]} for image in document["images"]]
    for annotation in document["annotations"]:
        del annotation["bbox"]
    assert json.loads(open_data(draw_coco(tmp_path, document), COUNTING)[1].suffix) == {"dime": 1, "penny": 1}


NO_COCO = [
    ("{", r"line 1: broken JSON: .*column 2"),
    ('{\n"images": [,]}', "line 2: broken JSON"),
    ("[" * 100_000, "broken JSON"),
    ("[]", "is missing or no list of objects. Found: a list"),
    ('{"images": [],\n "annotations": []}', "categories is missing .*Found: an object with images, annotations"),
    ('{"images": [], "annotations": [3], "categories": []}', "annotations is missing or no list of objects"),
    ('{"images": [{}], "annotations": [], "categories": []}', r"images\[0\] has no id"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "the category 1 has no name"),
    ('{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}', r"images\[1\] has the id 1, which"),
    ('{"images": [], "annotations": [], "categories": []}', "has no samples"),
    (b'{"images": "\xff"}', "not UTF-8"),
]


@pytest.mark.parametrize(("content", "reason"), NO_COCO, ids=range(len(NO_COCO)))
def test_what_is_no_coco_file_is_said_to_be_none(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"(?s)instances\.json.*{reason}"):
        open_data(path, DataSettings(reader="coco"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"reader": "xml"}, "data.reader is 'xml'. It is one of auto, jsonl"),
        ({"form": "boxes"}, "data.form"),
        ({"answer": "last"}, "data.answer"),
        ({"classes": ("a", "a")}, "data.classes"),
        ({"classes": "dime"}, "data.classes"),
        ({"classes": []}, "data.classes"),
        ({"skip_bad": -1}, "data.skip_bad"),
        ({"skip_bad": True}, "data.skip_bad"),
        ({"question": " "}, "data.question is empty"),
    ],
)
def test_settings_that_no_reader_knows_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        DataSettings(**values)


def test_classes_may_come_as_the_list_of_a_recipe_file() -> None:
    assert DataSettings(classes=["a", "b"]).classes == ("a", "b")  # type: ignore[arg-type]
