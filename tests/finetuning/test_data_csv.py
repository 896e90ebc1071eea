"""CSV and TSV with a line of names, and the Hub's metadata.csv beside pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_data import draw, draw_jsonl

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, EntrySamples, open_data

PLAIN = DataSettings()


def rows_of(samples: EntrySamples) -> list[tuple[str, str]]:
    return [(sample.prefix, sample.suffix) for sample in (samples[i] for i in range(len(samples)))]


def written(folder: Path, content: bytes | str, name: str = "data.csv") -> Path:
    draw_jsonl(folder, 3).unlink()
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_first_line_names_the_columns_and_shows_the_delimiter(tmp_path: Path, delimiter: str) -> None:
    lines = ["image,question,answer", "1.png,what?,a cat", "2.png,,5"]
    path = written(tmp_path, "\n".join(lines).replace(",", delimiter))
    samples = open_data(path, PLAIN)
    assert rows_of(samples) == [("what?", "a cat"), ("", "5")]
    picture = samples[0].picture
    assert picture is not None and picture.read().tobytes() == draw(1).tobytes()
    assert samples[1].place == f"{path}, line 3"


def test_quoted_fields_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    text = '\ufeffimage,answer\r\n1.png,"two\r\nlines, ""quoted"""\r\n\r\n2.png,plain\r\n'
    samples = open_data(written(tmp_path, text), PLAIN)
    assert rows_of(samples) == [("", 'two\r\nlines, "quoted"'), ("", "plain")]
    assert samples[1].place.endswith("line 5")


def test_a_tsv_with_names_is_no_table_of_images(tmp_path: Path) -> None:
    assert rows_of(open_data(written(tmp_path, "image\ttext\n1.png\ta, b\n", "x.tsv"), PLAIN)) == [("", "a, b")]


def test_the_hubs_image_folder_with_metadata_csv_opens_by_its_folder(tmp_path: Path) -> None:
    written(tmp_path, "file_name,text\n1.png,a cat\n", "metadata.csv")
    assert rows_of(open_data(tmp_path, PLAIN)) == [("", "a cat")]


def test_the_hubs_image_folder_with_metadata_jsonl_opens_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        written(tmp_path / split, f'{{"file_name": "1.png", "text": "{split}"}}\n', "metadata.jsonl")
    assert rows_of(open_data(f"{tmp_path}:test", PLAIN)) == [("", "test")]


BAD = [
    ("", r"data.csv is empty\. A line of column names, and one for each sample, was expected"),
    ("image,answer\n", r"data.csv is empty"),
    ("1.png,a cat\n2.png,a dog\n", r"no column for the image: .*found 1.png, a cat"),
    ("image,answer,image\n1.png,a,b\n", "line 1: the column 'image' stands twice"),
    ("image,answer\n1.png,a,b\n", r"line 2: 3 columns, where the first line names 2 \(image, answer\)\. Put quotes"),
    ("image,answer\n1.png\n", r"line 2: 1 column, where the first line names 2 .*\. Write one ',' less"),
    ("image,answer\n1.png,\n", "line 2: 'answer' holds an empty text"),
    (b"image,answer\n1.png,caf\xe9\n", "line 2: not UTF-8 .byte 0xe9"),
    ("image,answer\n1.png,a\n9.png,a\n", "line 3: the image '9.png' is not in"),
    ("image,answer\n1.png,a\n,a\n", "line 3: '' is no name of an image"),
    ('image,answer\n1.png,a\n2.png,"a\nb\n', "line 3: broken CSV: unexpected end of data"),
    ('image,answer\n1.png,a\n2.png,"a"b\n', "line 3: broken CSV: ',' expected after"),
    ("image,answer\n1.png,a".encode("utf-16"), "not UTF-8 .byte 0xff"),
]


@pytest.mark.parametrize(("content", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_csv_is_named_with_its_line(tmp_path: Path, content: bytes | str, reason: str) -> None:
    with pytest.raises(DataError, match=f"(?s){reason}"):
        open_data(written(tmp_path, content), PLAIN)


def test_a_bad_row_of_a_csv_can_be_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, "image,answer\n1.png,a\n2.png,a,b\n0.png,c\n")
    samples = open_data(path, DataSettings(skip_bad=1))
    assert rows_of(samples) == [("", "a"), ("", "c")] and "line 3: 3 columns" in samples.skipped[0]
