"""The share of the data that is measured on is chosen by what pictures hold, not by what they are called."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from drawn_data import coco_document, draw, draw_coco, draw_jsonl, draw_muge, encoded, write_lines

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, EntrySamples, content_keys, open_divided
from weightport.finetuning.data.content_keys import PicturesRead
from weightport.finetuning.data.samples import Picture

PLAIN = DataSettings()
COUNT, SHARE = 40, 0.3
NUMBERS = {draw(number).tobytes(): number for number in range(COUNT)}


def numbers_in(samples: EntrySamples) -> set[int]:
    """Which of the drawn pictures the samples are about."""
    pictures = (samples[i].picture for i in range(len(samples)))
    return {NUMBERS[picture.read().tobytes()] for picture in pictures if picture}


def divided(*paths: Path, settings: DataSettings = PLAIN) -> tuple[set[int], set[int]]:
    """The pictures to train on and those to measure on, which have none in common."""
    training, evaluation = map(numbers_in, open_divided(paths, settings, SHARE))
    assert not training & evaluation and training | evaluation == set(range(COUNT))
    return training, evaluation


def lines(folder: Path, names: Sequence[str]) -> Path:
    """JSON lines about the drawn pictures, which bear `names`."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(number))
    return write_lines(folder / "x.jsonl", [{"image": name, "suffix": name} for name in names])


def shard(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as archive:
        for number in range(COUNT):
            for ending, content in (("png", encoded(number)), ("txt", b"answer")):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "x.tar"


def table(folder: Path) -> Path:
    """Every third picture in a file beside the table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    cells = [{"bytes": encoded(number), "path": None} for number in range(COUNT)]
    for number in range(0, COUNT, 3):
        (folder / f"p{number}.png").write_bytes(encoded(number))
        cells[number] = {"bytes": None, "path": f"p{number}.png"}
    pq.write_table(pa.table({"image": cells, "suffix": ["a"] * COUNT}), folder / "x.parquet")
    return folder / "x.parquet"


def classes(folder: Path) -> Path:
    for number in range(COUNT):
        place = folder / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(encoded(number))
    return folder


def coco_captions(folder: Path) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(encoded(number))
    document = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(COUNT)],
        "annotations": [{"id": number, "image_id": number, "caption": "a"} for number in range(COUNT)],
    }
    (folder / "captions_x.json").write_text(json.dumps(document))
    return folder / "captions_x.json"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "tar": shard,
    "table": table,
    "folders": classes,
    "coco": lambda folder: draw_coco(folder, coco_document(COUNT)),
    "captions": coco_captions,
    "muge": lambda folder: draw_muge(folder, count=COUNT, captions=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_pictures_out(layout: str, tmp_path: Path) -> None:
    expected = divided(lines(tmp_path / "lines", [f"{number}.png" for number in range(COUNT)]))
    assert divided(LAYOUTS[layout](tmp_path / layout)) == expected


def test_other_names_in_another_folder_change_nothing(tmp_path: Path) -> None:
    expected = divided(lines(tmp_path / "a", [f"{number}.png" for number in range(COUNT)]))
    assert divided(lines(tmp_path / "b" / "c", [f"other-{number * 7}.bin.png" for number in range(COUNT)])) == expected
    assert 5 <= len(expected[1]) <= 20


@pytest.mark.parametrize("together", [True, False])
def test_a_picture_under_two_names_is_on_one_side(together: bool, tmp_path: Path) -> None:
    if together:
        paths = [draw_jsonl(tmp_path, COUNT)]
        for number in range(COUNT):
            (tmp_path / f"copy-of-{number}.png").write_bytes(encoded(number))
        copies = [{"image": f"copy-of-{number}.png", "prefix": "q", "suffix": "a"} for number in range(COUNT)]
        with open(paths[0], "a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in copies)
    else:
        paths = [draw_jsonl(tmp_path / "a", COUNT), lines(tmp_path / "b", [f"x{n}.png" for n in range(COUNT)])]
    # `divided` finds that no picture is on both.
    divided(*paths)
    assert sum(map(len, open_divided(paths, PLAIN, SHARE))) == 2 * COUNT


def test_texts_alone_are_chosen_by_what_they_ask(tmp_path: Path) -> None:
    settings = DataSettings(text_only=True)
    rows = [{"image": "", "prefix": f"question {number}?", "suffix": f"{number}"} for number in range(60)]
    again = [{**row, "suffix": "another answer"} for row in rows]

    def asked(*found: dict[str, str], name: str) -> list[set[str]]:
        sides = open_divided(write_lines(tmp_path / name, found), settings, SHARE)
        return [{side[i].prefix for i in range(len(side))} for side in sides]

    training, evaluation = asked(*rows, name="a.jsonl")
    assert not training & evaluation and 8 < len(evaluation) < 30
    assert asked(*reversed(rows), *again, name="b.jsonl") == [training, evaluation]
    # Where nothing is asked, the answers say what is the same.
    blank = [{"image": "", "prefix": "", "suffix": f"{number}"} for number in range(60)]
    assert 30 < len(open_divided(write_lines(tmp_path / "c.jsonl", blank), settings, SHARE)[0]) < 55


@pytest.mark.parametrize("layout", ["jsonl", "tar"])
def test_answers_of_a_chat_without_a_picture_are_on_one_side(layout: str, tmp_path: Path) -> None:
    chats = []
    for number in range(30):
        said = [f"first {number}", "a", f"then {number}", "b"]
        roles = ("user", "assistant") * 2
        chats.append({"messages": [{"role": role, "content": text} for role, text in zip(roles, said)]})
    path = write_lines(tmp_path / "x.jsonl", chats)
    if layout == "tar":
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as archive:
            for number, chat in enumerate(chats):
                content = json.dumps(chat).encode()
                member = tarfile.TarInfo(f"{number:05}.json")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    sides = open_divided(path, DataSettings(text_only=True), SHARE)
    found = [[side[i] for i in range(len(side))] for side in sides]
    begun = [{each.history[0][0] if each.history else each.prefix for each in side} for side in found]
    assert not begun[0] & begun[1] and len(begun[0] | begun[1]) == 30
    assert all(len(side) == 2 * len(chats) for side, chats in zip(sides, begun))


def test_questions_of_a_chat_that_are_asked_by_themselves_are_chosen_by_themselves(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(30):
            said = [f"q{number}", "a", f"q{(number + 1) % 30}", "b"]
            roles = ("user", "assistant") * 2
            content = json.dumps({"messages": [{"role": role, "content": text} for role, text in zip(roles, said)]})
            member = tarfile.TarInfo(f"{number:05}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    sides = open_divided(tmp_path / "x.tar", DataSettings(text_only=True, turns="alone"), SHARE)
    training, evaluation = ({side[i].prefix for i in range(len(side))} for side in sides)
    assert not training & evaluation and len(training | evaluation) == 30


def test_other_bytes_under_the_same_name_are_other_data_for_resuming(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, COUNT)
    before = [side.content for side in open_divided(path, PLAIN, SHARE)]
    for number in range(COUNT):
        content = bytearray(encoded(number))
        content[-1] ^= 1  # the check sum of the last chunk
        (tmp_path / f"{number}.png").write_bytes(content)
    after = [side.content for side in open_divided(path, PLAIN, SHARE)]
    assert before[0] != after[0] and before[1] != after[1]


def test_a_picture_that_cannot_be_decoded_is_said_where_it_is_read(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, COUNT)
    (tmp_path / "7.png").write_bytes(b"no picture")
    samples = [side[i] for side in open_divided(path, PLAIN, SHARE) for i in range(len(side))]
    broken = next(each.picture for each in samples if each.picture and each.picture.key == "7.png")
    with pytest.raises(DataError, match=r"line 8: the image 7\.png cannot be read as a picture"):
        broken.read()
    (tmp_path / "8.png").unlink()
    with pytest.raises(DataError, match=r"line 9: the image '8\.png' is not in"):
        open_divided(path, PLAIN, SHARE)


def test_broken_base64_moves_nothing_else_and_is_said_where_it_is_read(tmp_path: Path) -> None:
    path = draw_muge(tmp_path, count=COUNT, captions=1)
    expected = numbers_in(open_divided(path, PLAIN, SHARE)[1])
    images = tmp_path / "train_imgs.tsv"
    images.write_bytes(images.read_bytes().replace(b"1000\t", b"1000\t!"))
    training, evaluation = open_divided(path, PLAIN, SHARE)
    read = []
    for side in (training, evaluation):
        for picture in (side[i].picture for i in range(len(side))):
            assert picture is not None
            if picture.key == "1000":
                with pytest.raises(DataError, match="broken base64"):
                    picture.read()
            elif side is evaluation:
                read.append(NUMBERS[picture.read().tobytes()])
    assert set(read) == expected - {0}


def test_each_picture_is_read_once_and_none_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_jsonl(tmp_path, COUNT)
    rows = [{"image": f"{n % COUNT}.png", "prefix": f"q{n}", "suffix": "a"} for n in range(5 * COUNT)]
    path, read, stored = write_lines(tmp_path / "x.jsonl", rows), [], Picture.stored
    monkeypatch.setattr(Picture, "stored", lambda self: read.append(self.key) or stored(self))
    monkeypatch.setattr(Picture, "read", lambda self, draft=None: pytest.fail("decoded"))
    open_divided(path, PLAIN, SHARE)
    assert sorted(read) == sorted(f"{number}.png" for number in range(COUNT))


def test_one_picture_at_a_time_is_in_memory(tmp_path: Path) -> None:
    size, count = 2**23, 12
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(count):
            for ending, content in (("png", bytes([number]) * size), ("txt", b"a")):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    tracemalloc.start()
    try:
        training, evaluation = open_divided(tmp_path / "x.tar", PLAIN, SHARE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(training) + len(evaluation) == count and peak < 2.5 * size


def test_reading_that_takes_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = draw_jsonl(tmp_path, COUNT), []
    open_divided(path, PLAIN, SHARE, said.append)
    assert not said
    monkeypatch.setattr(content_keys, "SECONDS_BETWEEN_LINES", 0.0)
    open_divided(path, PLAIN, SHARE, said.append)
    assert said[-1].startswith(f"share by content: {COUNT} pictures of {COUNT} rows read · ")
    open_divided(table(tmp_path / "table"), PLAIN, SHARE, said.append)
    assert said[-1].startswith(f"share by content: {COUNT} pictures of {COUNT} rows read · ")
    PicturesRead(3, said.append)(2)
    assert said[-1].startswith("share by content: 2 pictures of 3 rows read")
