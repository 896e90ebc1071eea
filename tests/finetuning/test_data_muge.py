"""MUGE: captions in JSONL, images in a TSV."""

from __future__ import annotations

import base64
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import draw, draw_muge, encoded, write_lines
from torch.utils.data import DataLoader, Dataset

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, open_data
from weightport.finetuning.data.samples import Sample

PLAIN = DataSettings()


def pixels(sample: Sample) -> bytes:
    assert sample.picture is not None
    return sample.picture.read().tobytes()


def test_training_has_a_sample_for_every_pair(tmp_path: Path) -> None:
    samples = open_data(draw_muge(tmp_path), PLAIN)
    assert len(samples) == 30
    assert [samples[i].suffix for i in (0, 9, 10, 29)] == ["图0 第0句", "图0 第9句", "图1 第0句", "图2 第9句"]
    assert [pixels(samples[i]) == draw(i // 10).tobytes() for i in range(30)] == [True] * 30
    assert {samples[i].picture.key for i in range(10, 20)} == {"1001"}
    assert samples[10].place == f"{tmp_path}/train.jsonl, line 2" and samples[10].prefix == ""
    assert len(open_data(tmp_path / "train.jsonl", DataSettings(answer="first"))) == 3


def test_evaluation_has_a_sample_for_every_image_with_all_captions(tmp_path: Path) -> None:
    path = draw_muge(tmp_path, captions=2)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"image_id": 1000, "text": "一句"}\n')  # the id as a number, one text instead of a list
    grouped = open_data(path, PLAIN, grouped=True)
    assert [sample.references for sample in (grouped[i] for i in range(len(grouped)))] == [
        ("图0 第0句", "图0 第1句", "一句"),
        ("图1 第0句", "图1 第1句"),
        ("图2 第0句", "图2 第1句"),
    ]
    assert [pixels(grouped[i]) == draw(i).tobytes() for i in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("captions", "tables", "chosen"),
    [
        ("train.jsonl", ["train.tsv", "train_imgs.tsv", "valid.tsv"], "train.tsv"),
        ("train.jsonl", ["train_imgs.tsv", "valid_imgs.tsv"], "train_imgs.tsv"),
        ("IC_valid.jsonl", ["IC_train.tsv", "IC_valid.tsv"], "IC_valid.tsv"),
        ("MR_valid_queries.jsonl", ["MR_train_imgs.tsv", "MR_valid_imgs.tsv"], "MR_valid_imgs.tsv"),
        ("captions.jsonl", ["images.tsv"], "images.tsv"),
        ("train.jsonl", ["images.tsv"], "images.tsv"),
    ],
)
def test_the_image_table_is_found_by_the_captions_name(
    tmp_path: Path, captions: str, tables: list[str], chosen: str
) -> None:
    for table in tables:
        (tmp_path / table).write_bytes(b"1\t%s\n" % base64.b64encode(encoded(tables.index(table))))
    path = write_lines(tmp_path / captions, [{"image_id": "1", "text": ["字"]}])
    assert pixels(open_data(path, PLAIN)[0]) == draw(tables.index(chosen)).tobytes()


@pytest.mark.parametrize("tables", [[], ["valid_imgs.tsv"], ["a.tsv", "b.tsv"]])
def test_without_a_clear_image_table_the_error_says_what_was_looked_for(tmp_path: Path, tables: list[str]) -> None:
    for table in tables:
        (tmp_path / table).touch()
    path = write_lines(tmp_path / "train.jsonl", [{"image_id": "1", "text": ["字"]}])
    with pytest.raises(
        DataError, match=r"Looked in .* for train\.tsv, train_imgs\.tsv.*found .*data\.images"
    ) as raised:
        open_data(path, PLAIN)
    assert all(table in str(raised.value) for table in tables)


def test_the_settings_name_the_image_table_or_its_folder(tmp_path: Path) -> None:
    draw_muge(tmp_path / "images")
    (tmp_path / "images" / "train_imgs.tsv").rename(tmp_path / "images" / "train.tsv")
    path = (tmp_path / "images" / "train.jsonl").rename(tmp_path / "train.jsonl")
    for images in ("images", "images/train.tsv", str(tmp_path / "images")):
        assert len(open_data(path, DataSettings(images=images))) == 30
    with pytest.raises(DataError, match=r"data\.images is nowhere"):
        open_data(path, DataSettings(images="nowhere"))


def test_a_folder_of_two_splits_opens_by_the_split(tmp_path: Path) -> None:
    draw_muge(tmp_path, "train", 3)
    draw_muge(tmp_path, "valid", 2)
    assert len(open_data(tmp_path, DataSettings(split="valid"), grouped=True)) == 2
    with pytest.raises(DataError, match=r"several annotation files: train\.jsonl, valid\.jsonl"):
        open_data(tmp_path, PLAIN)


PIXEL = base64.b64encode(encoded(0))
BAD_ROWS = [
    (b"no tab here", "no tab"),
    (b"\t" + PIXEL, "no image id"),
    (b"7\t", "no image after the tab"),
    (b"7\tcaption\t" + PIXEL, "more than two columns"),
    (b"\xff7\t" + PIXEL, "not UTF-8"),
    (b"1\t" + PIXEL, "the image id 1 stands in line 1 already"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_bad_row_of_the_image_table_is_named_or_skipped(tmp_path: Path, row: bytes, reason: str) -> None:
    (tmp_path / "train.tsv").write_bytes(b"1\t" + PIXEL + b"\n" + row + b"\n2\t" + PIXEL)
    path = write_lines(tmp_path / "train.jsonl", [{"image_id": n, "text": ["字"]} for n in "12"])
    with pytest.raises(DataError, match=f"train.tsv, line 2: {reason}"):
        open_data(path, PLAIN)
    samples = open_data(path, DataSettings(skip_bad=1))
    assert len(samples) == 2 and pixels(samples[0]) == pixels(samples[1]) == draw(0).tobytes()


BAD_CAPTIONS: list[tuple[Any, str]] = [
    ({"image_id": "9", "text": ["字"]}, r"the image id 9 is not in .*train\.tsv"),
    ({"image_id": "1", "text": ["字", ""]}, "'text' holds an empty text"),
    ({"image_id": "1", "text": []}, "'text' is empty"),
    ({"image_id": "1"}, "no 'text'"),
    ({"image_id": None, "text": ["字"]}, "an image id was expected, found null"),
    ({"text": ["字"]}, "no 'image_id'"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_CAPTIONS, ids=range(len(BAD_CAPTIONS)))
def test_a_bad_caption_is_named_or_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    (tmp_path / "train.tsv").write_bytes(b"1\t" + PIXEL + b"\n")
    path = write_lines(tmp_path / "train.jsonl", [{"image_id": "1", "text": ["字"]}, row])
    with pytest.raises(DataError, match=f"train.jsonl, line 2: {reason}"):
        open_data(path, PLAIN)
    assert len(open_data(path, DataSettings(skip_bad=1))) == 1


@pytest.mark.parametrize(
    ("content", "reason"), [(b"A", "broken base64"), (b"!!!!", "broken base64"), (b"AAAA", "cannot be read")]
)
def test_an_image_that_is_none_is_named_by_its_row_when_it_is_read(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "train.tsv").write_bytes(b"1\t" + PIXEL + b"\n2\t" + content + b"\n")
    path = write_lines(tmp_path / "train.jsonl", [{"image_id": "2", "text": ["字"]}])
    sample = open_data(path, PLAIN)[0]
    assert sample.picture is not None
    with pytest.raises(DataError, match=rf"train\.tsv, line 2: .*{reason}"):
        sample.picture.read()


class Read(Dataset[bytes]):
    """What a worker does: reads a sample and its picture."""

    def __init__(self, path: Path) -> None:
        self.samples = open_data(path, PLAIN)
        self.samples[0]  # opened in the parent already

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        sample = self.samples[index]
        return sample.suffix, int(torch.frombuffer(bytearray(pixels(sample)), dtype=torch.uint8).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_workers_read_the_same_as_one_process(tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    data = Read(draw_muge(tmp_path, count=4, captions=5))
    loader: DataLoader[Any] = DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=method, shuffle=False
    )
    assert [tuple(item) for item in loader] == [data[i] for i in range(len(data))]
