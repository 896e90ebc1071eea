"""JSONL with an image folder."""

from __future__ import annotations

import gc
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from drawn_data import draw, draw_jsonl, encoded, write_lines

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, EntrySamples, open_data

PLAIN = DataSettings()


def rows_of(samples: EntrySamples) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(sample.prefix, sample.suffix, sample.references) for sample in (samples[i] for i in range(len(samples)))]


def same_picture(samples: EntrySamples, index: int, number: int) -> bool:
    picture = samples[index].picture
    assert picture is not None
    return picture.read().tobytes() == draw(number).tobytes()


def test_every_row_is_a_sample_with_its_own_picture(tmp_path: Path) -> None:
    samples = open_data(draw_jsonl(tmp_path), PLAIN)
    assert len(samples) == 4
    assert rows_of(samples)[1] == ("what colour?", "green", ("green",))
    assert all(same_picture(samples, i, i) for i in range(4))
    assert samples[2].place == f"{tmp_path}/annotations.jsonl, line 3"
    assert samples[2].picture is not None and samples[2].picture.key == "2.png"
    assert samples[-1].suffix == "orange"
    with pytest.raises(IndexError, match="has 4 samples; there is no 4"):
        samples[4]


def test_split_chooses_a_folder_and_without_it_the_error_names_them(tmp_path: Path) -> None:
    for count, split in ((2, "train"), (3, "valid"), (4, "test")):
        draw_jsonl(tmp_path / split, count)
    assert len(open_data(tmp_path, DataSettings(split="validation"))) == 3
    assert len(open_data(f"{tmp_path}:test", PLAIN)) == 4
    assert len(open_data(tmp_path / "train", DataSettings(split="train"))) == 2
    with pytest.raises(DataError, match=r"has the parts test, train, valid.*data\.split"):
        open_data(tmp_path, PLAIN)
    with pytest.raises(DataError, match=r"has no split holdout\. Found: test, train, valid"):
        open_data(tmp_path, DataSettings(split="holdout"))


def test_columns_are_found_by_known_names_or_by_the_settings(tmp_path: Path) -> None:
    draw_jsonl(tmp_path, 1)
    known = write_lines(tmp_path / "a" / "a.jsonl", [{"file_name": "0.png", "question": "q", "answer": "a"}])
    samples = open_data(known, DataSettings(images=str(tmp_path)))
    assert rows_of(samples) == [("q", "a", ("a",))]
    named = write_lines(tmp_path / "named.jsonl", [{"bild": "0.png", "text": "t", "soll": "s", "suffix": "other"}])
    settings = DataSettings(image_column="bild", suffix_column="soll", prefix_column="text")
    assert rows_of(open_data(named, settings)) == [("t", "s", ("s",))]
    with pytest.raises(
        DataError, match=r"no column for the image.*found bild, text, soll, suffix.*data\.image_column"
    ):
        open_data(named, PLAIN)
    with pytest.raises(DataError, match=r"no column 'frage' \(data\.prefix_column\).*Found: bild"):
        open_data(named, DataSettings(image_column="bild", prefix_column="frage"))


def test_several_answers_are_all_references_and_training_takes_the_first_or_each(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 2, suffix=["a", "b", "c"])
    assert [row[1] for row in rows_of(open_data(path, PLAIN))] == ["a", "a"]
    each = open_data(path, DataSettings(answer="each"))
    assert [row[1] for row in rows_of(each)] == ["a", "b", "c"] * 2
    assert all(row[2] == ("a", "b", "c") for row in rows_of(each))
    assert [same_picture(each, i, i // 3) for i in range(6)] == [True] * 6


def test_lines_that_ask_the_same_of_one_image_are_one_question_for_evaluation(tmp_path: Path) -> None:
    draw_jsonl(tmp_path, 2)
    rows = [("1.png", "q", "a"), ("0.png", "q", "b"), ("1.png", "other", "c"), ("1.png", "q", "d")]
    path = write_lines(tmp_path / "x.jsonl", [dict(zip(("image", "prefix", "suffix"), row)) for row in rows])
    assert len(open_data(path, PLAIN)) == 4
    grouped = open_data(path, PLAIN, grouped=True)
    assert rows_of(grouped) == [("q", "a", ("a", "d")), ("q", "b", ("b",)), ("other", "c", ("c",))]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_do_not_shift_lines(tmp_path: Path) -> None:
    draw_jsonl(tmp_path, 1)
    row = '{"image": "0.png", "prefix": "", "suffix": "%s"}\r'
    path = write_lines(tmp_path / "x.jsonl", ["\ufeff" + row % "颜色", "", "  \r", row % "b"])
    samples = open_data(path, PLAIN)
    assert [sample[1] for sample in rows_of(samples)] == ["颜色", "b"]
    assert samples[1].place.endswith("line 4")


BAD_LINES: list[tuple[Any, str]] = [
    ('{"image": "0.png", "prefix": ', r"broken JSON: Expecting value \(column 30\)"),
    ("[1, 2]", "a JSON object was expected, found a list"),
    ("[" * 100_000, "broken JSON"),
    (b'{"image": "0.png", "prefix": "\xb0", "suffix": "a"}', "not UTF-8 \\(byte 0xb0 at position 31\\)"),
    ({"image": "0.png", "prefix": "q"}, "no 'suffix'. Found: 'image', 'prefix'"),
    ({"image": "0.png", "prefix": "q", "suffix": " "}, "'suffix' holds an empty text"),
    ({"image": "0.png", "prefix": "q", "suffix": []}, "'suffix' is empty"),
    ({"image": "0.png", "prefix": "q", "suffix": None}, "'suffix' is empty"),
    ({"image": "0.png", "prefix": "q", "suffix": {"a": 1}}, "holds an object where a text.*a string that holds JSON"),
    ({"image": "0.png", "prefix": 3, "suffix": "a"}, "'prefix' holds a number where a text was expected"),
    ('{"image": "0.png", "prefix": "\\ud800", "suffix": "a"}', "half of a surrogate pair"),
    ({"image": "none.png", "prefix": "q", "suffix": "a"}, "the image 'none.png' is not in .*No such file"),
    ({"image": "empty.png", "prefix": "q", "suffix": "a"}, "is an empty file"),
    ({"image": "inner", "prefix": "q", "suffix": "a"}, "is no file"),
    ({"image": None, "prefix": "q", "suffix": "a"}, "the name of an image was expected, found null"),
    ({"image": "a\0b", "prefix": "q", "suffix": "a"}, "is no name of an image"),
    ('{"image": "\\ud800.png", "prefix": "q", "suffix": "a"}', "half of a surrogate pair"),
    ({"image": "../0.png", "prefix": "q", "suffix": "a"}, "leads out of the image folder"),
    ({"image": "/etc/hostname", "prefix": "q", "suffix": "a"}, "leads out of the image folder"),
    ({"image": "C:\\0.png", "prefix": "q", "suffix": "a"}, "leads out of the image folder"),
    ({"image": "link.png", "prefix": "q", "suffix": "a"}, "through a symbolic link"),
    ({"image": "away/0.png", "prefix": "q", "suffix": "a"}, "through a symbolic link"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_when_the_data_is_opened_or_skipped(tmp_path: Path, line: Any, reason: str) -> None:
    folder = tmp_path / "data"
    draw_jsonl(folder, 1)
    (folder / "empty.png").touch()
    (folder / "inner").mkdir()
    draw_jsonl(tmp_path / "elsewhere", 1)
    (folder / "link.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    good = {"image": "0.png", "prefix": "q", "suffix": "a"}
    path = write_lines(folder / "x.jsonl", [good, line, good])
    with pytest.raises(DataError, match=f"(?s)x.jsonl, line 2: .*{reason}.*--skip-bad"):
        open_data(path, PLAIN)
    samples = open_data(path, DataSettings(skip_bad=1))
    assert len(samples) == 2 and len(samples.skipped) == 1
    assert samples.skipped[0].startswith(f"{path}, line 2: ")
    assert samples[1].place.endswith("line 3")


def test_one_bad_line_too_many_ends_the_reading_with_the_first_reasons(tmp_path: Path) -> None:
    good = draw_jsonl(tmp_path, 3).read_text().splitlines()
    path = write_lines(tmp_path / "x.jsonl", [good[0], "{", "{", good[1], "{"])
    assert len(open_data(path, DataSettings(skip_bad=3))) == 2
    with pytest.raises(DataError, match=r"(?s)than the 2 that --skip-bad allows:.*line 2: .*line 3: .*line 5: "):
        open_data(path, DataSettings(skip_bad=2))


def test_a_picture_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"no picture")
    samples = open_data(path, PLAIN)
    picture = samples[1].picture
    assert picture is not None
    with pytest.raises(DataError, match=r"annotations\.jsonl, line 2: the image 1\.png cannot be read as a picture"):
        picture.read()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error_and_not_an_empty_data_set(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"x\.jsonl is empty"):
        open_data(tmp_path / "x.jsonl", PLAIN)


def test_only_bad_lines_are_no_data_set_even_when_all_may_be_skipped(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 2, suffix="")
    with pytest.raises(DataError, match=r"(?s)has no samples\. Skipped:.*line 1"):
        open_data(path, DataSettings(skip_bad=9))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 3)
    samples = open_data(path, PLAIN)
    path.write_text(path.read_text().replace("red", "crimson"))
    with pytest.raises(DataError, match="has changed since it was opened"):
        samples[0]


def test_the_fingerprint_follows_files_images_and_settings(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 3)
    first = open_data(path, PLAIN).fingerprint
    assert first == open_data(path, PLAIN).fingerprint and len(first) == 64
    assert first != open_data(path, DataSettings(answer="each")).fingerprint
    os.utime(tmp_path / "2.png", ns=(1, 1))
    assert first != open_data(path, PLAIN).fingerprint


def test_samples_survive_pickling_without_open_files(tmp_path: Path) -> None:
    samples = open_data(draw_jsonl(tmp_path, 3), PLAIN)
    assert samples[0].suffix == "red"  # the file is open now
    again, rows = pickle.loads(pickle.dumps(samples)), rows_of(samples)
    sample = pickle.loads(pickle.dumps(samples[1]))
    assert len(pickle.dumps(samples[1])) < 2000
    del samples
    gc.collect()
    assert rows_of(again) == rows
    assert sample.picture.read().tobytes() == draw(1).tobytes()


def write_long(path: Path, lines: int) -> Path:
    """A JSONL file of 450 bytes a line."""
    path.with_name("0.png").write_bytes(encoded(0))
    path.write_text((json.dumps({"image": "0.png", "prefix": "q" * 200, "suffix": "a" * 200}) + "\n") * lines)
    return path


def test_a_long_file_is_kept_as_places_and_not_as_lines(tmp_path: Path) -> None:
    lines = 200_000
    path = write_long(tmp_path / "long.jsonl", lines)
    samples = open_data(path, PLAIN)
    assert samples[lines - 1].place.endswith(f"line {lines}")
    assert path.stat().st_size > 400 * lines
    assert len(pickle.dumps(samples)) < 40 * lines


def test_indexing_needs_no_more_memory_than_the_places(tmp_path: Path) -> None:
    lines = 20_000
    path = write_long(tmp_path / "long.jsonl", lines)
    open_data(path, PLAIN)
    tracemalloc.start()
    samples = open_data(path, PLAIN)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == lines
    # One buffer of the file, and arrays that grow by doubling at most.
    assert kept < 40 * lines + 2**18 and peak < 100 * lines + 2**21
