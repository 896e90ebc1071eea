"""Strange values in data files and recipes are one named error, or a bad sample that can be left out."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from drawn_data import coco_document, draw, draw_coco, draw_jsonl, write_lines
from PIL import EpsImagePlugin, Image

from weightport import cli
from weightport.errors import DataError, RecipeError
from weightport.finetuning.data import DataSettings, open_data
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.recipes.recipe import for_family, parse_recipe

HALF = "a\ud800"
"""Half of a surrogate pair, which JSON's escapes can write."""


def changed(part: str, **values: Any) -> dict[str, Any]:
    document = coco_document()
    document[part][0] |= values
    return document


NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "width": (changed("images", width=10**30), "width and height in pixels were expected, found 1000"),
    "height": (changed("images", height=10**400), "width and height in pixels were expected"),
    "bbox": (changed("annotations", bbox=[10**400, 0, 1, 1]), "bbox is .*Four numbers were expected"),
    "bbox of floats": (changed("annotations", bbox=[1e308, 0, 1e308, 1]), "bbox is .*Four numbers were expected"),
    "bbox of nothing": (changed("annotations", bbox=[float("nan"), 0, 1, 1]), "bbox is .*Four numbers were expected"),
}


@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("form", ["counting", "detection"])
def test_number_that_no_array_holds_is_a_bad_sample(form: str, what: str, tmp_path: Path) -> None:
    document, reason = NUMBERS[what]
    path = draw_coco(tmp_path, document)
    with pytest.raises(DataError, match=rf"image 0 \(0\.png\).*: {reason}"):
        open_data(path, DataSettings(form=form))
    assert len(open_data(path, DataSettings(form=form, skip_bad=1))) == 2


def test_supercategory_of_another_kind_groups_nothing(tmp_path: Path) -> None:
    assert len(open_data(draw_coco(tmp_path, changed("categories", supercategory=[1])), DataSettings())) == 3


LETTERS: dict[str, dict[str, Any]] = {
    "image id": changed("images", id=HALF),
    "annotation id": changed("annotations", id=HALF),
    "category": changed("categories", name=HALF),
    "image of an annotation": changed("annotations", image_id=HALF),
    "category of an annotation": changed("annotations", category_id=HALF),
}


@pytest.mark.parametrize("what", LETTERS)
def test_half_a_surrogate_pair_in_a_coco_file_is_named(what: str, tmp_path: Path) -> None:
    path = draw_coco(tmp_path)
    path.write_text(json.dumps(LETTERS[what]), "utf-8")
    with pytest.raises(DataError, match=r"\w+\[0\]: '\w+' holds half of a surrogate pair") as raised:
        open_data(path, DataSettings())
    str(raised.value).encode()


def test_half_a_surrogate_pair_in_a_name_is_written_as_its_escape(tmp_path: Path) -> None:
    path = draw_coco(tmp_path)
    path.write_text(json.dumps(changed("images", file_name=HALF)), "utf-8")
    samples = open_data(path, DataSettings(skip_bad=1))
    assert "a\\ud800" in samples.skipped[0].encode().decode()
    lines = write_lines(draw_jsonl(tmp_path), [json.dumps({"image": "0.png", HALF: "a"})])
    for settings in (DataSettings(), DataSettings(suffix_column="text")):
        with pytest.raises(DataError, match=r"a\\ud800") as raised:
            open_data(lines, settings)
        str(raised.value).encode()
    path.write_text(json.dumps({HALF: 1}), "utf-8")
    with pytest.raises(DataError, match=r"Found: an object with a\\ud800"):
        open_data(path, DataSettings(reader="coco"))


HEAD = "name: a\ntitle: b\n"
PUBLISHED = r"published\.ofa' holds settings .* and mistakes \(a list\)"
RECIPES = {
    "families of lists": (f"{HEAD}families: [[ofa]]", r"is for \['ofa'\], and the model is 'ofa'"),
    "settings in a list": (f"{HEAD}families: [ofa]\npublished: {{ofa: {{settings: [1]}}}}", PUBLISHED),
    "mistakes as a number": (f"{HEAD}families: [ofa]\npublished: {{ofa: {{mistakes: 5}}}}", PUBLISHED),
    "mistakes as text": (f"{HEAD}families: [ofa]\npublished: {{ofa: {{mistakes: abc}}}}", PUBLISHED),
    "setting of a number": (f"{HEAD}families: {{ofa: {{5: 1}}}}", "there is no setting '5'"),
}


@pytest.mark.parametrize("what", RECIPES)
def test_recipe_of_other_kinds_is_one_error(what: str) -> None:
    text, said = RECIPES[what]
    with pytest.raises(RecipeError, match=said):
        for_family(parse_recipe(text, "own.yaml"), "ofa")
    empty = parse_recipe(f"{HEAD}families: [ofa]\npublished: {{ofa: }}", "own.yaml")
    assert empty.published["ofa"].mistakes == ()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100))]
    parts = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in
             [*chunks, (b"IEND", b"")]]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged(kind: str, at: int, value: bytes) -> bytes:
    file = BytesIO()
    draw(0).save(file, kind)
    content = bytearray(file.getvalue())
    content[at : at + len(value)] = value
    return bytes(content)


PICTURES: dict[str, Callable[[], bytes]] = {
    "decompression bomb": bomb,
    "unknown pixel format": lambda: damaged("DDS", 80, b"\0\x40\0\0"),
    "unknown compression": lambda: b"BLP2" + struct.pack("<IBBBB2I", 1, 23, 0, 0, 0, 8, 8) + b"\0" * 1200,
    "half a picture": lambda: damaged("PNG", 0, b"")[:60],
    "no picture": lambda: b"this is no picture",
}


@pytest.mark.parametrize("what", PICTURES)
def test_picture_that_cannot_be_decoded_is_named(what: str, tmp_path: Path) -> None:
    content = PICTURES[what]()
    with pytest.raises(DataError, match=r"line 7: the image 7\.png cannot be read as a picture: "):
        Picture("7.png", "line 7", lambda: content).read()


def test_picture_that_is_a_program_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    draw(0).save(file, "EPS")
    ran: list[Any] = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: ran.append(args) or Image.new("RGB", (1, 1)).im
    )
    with pytest.raises(DataError, match="cannot be read as a picture: cannot identify"):
        Picture("7.eps", "line 7", file.getvalue).read()
    assert not ran


def test_bomb_in_the_training_data_is_left_out_when_asked(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path / "data", 3)
    (tmp_path / "data" / "1.png").write_bytes(bomb())
    words = [tiny("florence2"), "--data", path, "-o", tmp_path / "run", "--set", "dataloader_num_workers=0"]
    words += ["--set", "max_steps=3", "--set", "save_strategy=no", "--set", "per_device_train_batch_size=1"]
    done = CliRunner().invoke(cli.port_finetune, [str(word) for word in words])
    assert done.exit_code == 1 and "line 2: the image 1.png" in done.output and "--skip-bad" in done.output
    assert CliRunner().invoke(cli.port_finetune, [*map(str, words), "--skip-bad", "1"]).exit_code == 0
