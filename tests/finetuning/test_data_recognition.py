"""Which reader a path gets, and what is said where there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from drawn_data import coco_document, draw_coco, draw_jsonl, draw_muge, encoded, write_lines

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, open_data
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.recognition import Layout, recognise

PLAIN = DataSettings()


def reader_of(path: Path) -> str:
    (layout,) = recognise(str(path), PLAIN)
    return layout.reader


def test_files_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    draw_jsonl(tmp_path / "a", 1)
    draw_muge(tmp_path / "b")
    draw_coco(tmp_path / "c")
    readers = {
        tmp_path / "a": "jsonl",
        tmp_path / "a" / "annotations.jsonl": "jsonl",
        tmp_path / "b": "muge",
        tmp_path / "b" / "train.jsonl": "muge",
        tmp_path / "c": "coco",
        tmp_path / "c" / "_annotations.coco.json": "coco",
    }
    assert {path: reader_of(path) for path in readers} == readers


def test_json_lines_and_coco_documents_may_both_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    lines = write_lines(tmp_path / "lines.json", [{"image": "0.png", "suffix": "a"}] * 2)
    assert len(open_data(lines, PLAIN)) == 2
    one_line = write_lines(tmp_path / "one.json", [{"image": "0.png", "suffix": "a"}])
    assert reader_of(one_line) == "jsonl"
    for indent in (None, 1):
        coco = tmp_path / "coco.json"
        coco.write_text(json.dumps(coco_document(), indent=indent), "utf-8")
        assert reader_of(coco) == "coco"


def test_roboflow_folders_open_by_split(tmp_path: Path) -> None:
    for split, images in (("train", 3), ("valid", 2)):
        draw_coco(tmp_path / split, coco_document(images))
    (tmp_path / "README.roboflow.txt").touch()
    assert len(open_data(tmp_path, DataSettings(split="valid"))) == 2
    with pytest.raises(DataError, match="has the parts train, valid"):
        open_data(tmp_path, PLAIN)


def test_the_only_part_needs_no_split(tmp_path: Path) -> None:
    draw_coco(tmp_path / "train")
    assert len(open_data(tmp_path, PLAIN)) == 3


def test_roboflows_jsonl_of_several_splits_opens_by_split(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("valid", 2)):
        draw_jsonl(tmp_path, count).rename(tmp_path / f"_annotations.{split}.jsonl")
    assert len(open_data(tmp_path, DataSettings(split="valid"))) == 2


def test_a_folder_without_data_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.txt").touch()
    with pytest.raises(DataError, match="no data set found here") as raised:
        open_data(tmp_path, PLAIN)
    for words in ("annotations.jsonl", "_annotations.coco.json", "*.parquet", "save_to_disk", "00.txt", "2 more"):
        assert words in str(raised.value)
    with pytest.raises(DataError, match=r"Looked for _annotations\.coco\.json, .* can be given itself"):
        open_data(tmp_path, DataSettings(reader="coco"))


def test_a_file_of_another_kind_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_text("a,b\n")
    with pytest.raises(DataError, match=r"data\.xlsx is no data set that is known by its name.*\*\.csv.*\*\.jsonl"):
        open_data(tmp_path / "data.xlsx", PLAIN)
    (tmp_path / "train.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"It is compressed: unpack it"):
        open_data(tmp_path / "train.tar.gz", PLAIN)
    (tmp_path / "train.tsv").write_text("1\tAAAA\n")
    with pytest.raises(DataError, match=r"give the captions' JSONL, and this as data\.images"):
        open_data(tmp_path / "train.tsv", PLAIN)


def test_a_path_that_does_not_exist_is_no_hub_id_unless_it_looks_like_one(tmp_path: Path) -> None:
    for path in (str(tmp_path / "x.jsonl"), "nowhere.jsonl", "./a/b", "a/b/c", "nowhere", f"{tmp_path}/none:train"):
        with pytest.raises(DataError, match="does not exist"):
            open_data(path, PLAIN)
    with pytest.raises(DataError, match="does not exist"):
        open_data("owner/name", DataSettings(reader="jsonl"))
    assert recognise("owner/name", PLAIN) == [Layout("table", "owner/name")]


def test_a_folder_here_makes_a_missing_path_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/train does not exist"):
        open_data("data/train", PLAIN)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.json", "x.tar", "x.parquet", "x"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=r"is no regular file\. What comes from a pipe can be read once"):
            open_data(tmp_path / name, PLAIN)
    for name in ("-", "/dev/null"):
        with pytest.raises(DataError, match=f"^{name} is no regular file. What comes from a pipe"):
            open_data(name, PLAIN)
    with pytest.raises(DataError, match="is a folder, and a file was expected"):
        PinnedFile(tmp_path)


def test_a_class_folder_without_pictures_is_named(tmp_path: Path) -> None:
    for name in ("cat", "dog", "hen"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError) as nothing:
        open_data(tmp_path, PLAIN)
    assert "no picture:" not in str(nothing.value)
    (tmp_path / "cat" / "0.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match="Of its folders, dog, hen hold no picture: where they are classes, fill"):
        open_data(tmp_path, PLAIN)


def test_records_without_an_image_column_are_told_how_text_alone_is_taken(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"prefix": "q", "suffix": "a"}])
    with pytest.raises(DataError, match=r"no column for the image.*taken with data\.text_only=true"):
        open_data(path, PLAIN)
    assert open_data(path, DataSettings(text_only=True))[0].picture is None


def test_a_reader_that_does_not_fit_says_what_is_wrong(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 1)
    with pytest.raises(DataError, match="no image table"):
        open_data(path, DataSettings(reader="muge"))
    with pytest.raises(DataError, match=r"COCO detection JSON is an object with|broken JSON"):
        open_data(path, DataSettings(reader="coco"))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_data(path, DataSettings(reader="table"))
