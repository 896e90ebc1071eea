"""Class folders, WebDataset tars and COCO captions."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from drawn_data import answers, draw, encoded, pixels

from weightport.errors import DataError, WeightportError
from weightport.finetuning.data import DataSettings, open_data

PLAIN = DataSettings()


def classes(folder: Path, **numbers: tuple[int, ...]) -> Path:
    for name, each in numbers.items():
        (folder / name).mkdir(parents=True)
        for number in each:
            (folder / name / f"{number}.png").write_bytes(encoded(number))
    return folder


def test_the_name_of_a_folder_is_the_answer(tmp_path: Path) -> None:
    samples = open_data(classes(tmp_path, big_dog=(3,), cat=(1, 2)), PLAIN)
    assert answers(samples) == ["big_dog", "cat", "cat"]
    assert [pixels(samples, i) for i in range(3)] == [draw(n).tobytes() for n in (3, 1, 2)]
    assert samples.notes == (f"{tmp_path}: answers are the names of its 2 folders (big_dog, cat)",)
    assert samples[0].place == f"{tmp_path}, big_dog/3.png"
    assert answers(pickle.loads(pickle.dumps(samples))) == answers(samples)


def test_class_folders_of_a_split_open_by_its_name(tmp_path: Path) -> None:
    classes(tmp_path / "train", cat=(1,), dog=(2,))
    classes(tmp_path / "test", cat=(3,), dog=(4, 5))
    assert answers(open_data(f"{tmp_path}:test", PLAIN)) == ["cat", "dog", "dog"]
    with pytest.raises(DataError, match="has the parts test, train"):
        open_data(tmp_path, PLAIN)


def test_one_folder_is_classes_only_where_that_is_said(tmp_path: Path) -> None:
    classes(tmp_path, cat=(1,))
    with pytest.raises(DataError, match=r"no data set found here.*folders of pictures, a class each.*Found: cat"):
        open_data(tmp_path, PLAIN)
    assert answers(open_data(tmp_path, DataSettings(reader="folders"))) == ["cat"]


def test_a_folder_called_like_a_split_beside_others_is_asked_about(tmp_path: Path) -> None:
    classes(tmp_path, bus=(1,), train=(2,))
    with pytest.raises(DataError, match=r"train may be a class or a part, beside bus.*data.reader=folders"):
        open_data(tmp_path, PLAIN)
    assert answers(open_data(tmp_path, DataSettings(reader="folders"))) == ["bus", "train"]


def test_a_class_without_pictures_is_named(tmp_path: Path) -> None:
    classes(tmp_path, bus=(1,), car=())
    with pytest.raises(DataError, match=r"car: no picture of the class 'car' \(\.jpg"):
        open_data(tmp_path, DataSettings(reader="folders"))


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pair(number: int, text: str) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return (f"{number:04}.png", encoded(number)), (f"{number:04}.txt", text.encode())


def test_files_of_one_name_in_a_tar_are_a_sample_and_nothing_is_extracted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", *pair(1, "a cat\n"), *pair(2, "图片"))
    samples = open_data(path, PLAIN)
    assert answers(samples) == ["a cat", "图片"]
    assert [pixels(samples, i) for i in range(2)] == [draw(n).tobytes() for n in (1, 2)]
    assert samples[1].place == f"{path}, 0002" and list(tmp_path.iterdir()) == [path]
    again = pickle.loads(pickle.dumps(samples))
    assert pixels(again, 1) == draw(2).tobytes()


def test_a_json_in_a_tar_holds_columns_or_a_chat(tmp_path: Path) -> None:
    row = json.dumps({"question": "what?", "answer": 1.50, "image": "elsewhere.jpg"}).replace("1.5", "1.50").encode()
    path = write_tar(tmp_path / "x.tar", ("a/1.seg.png", encoded(1)), ("a/1.json", row), ("a/1.meta", b"?"))
    samples = open_data(path, PLAIN)
    assert [(samples[0].prefix, samples[0].suffix)] == [("what?", "1.50")]
    turns = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}] * 1
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    path = write_tar(tmp_path / "y.tar", ("1.png", encoded(1)), ("1.json", json.dumps({"messages": turns}).encode()))
    samples = open_data(path, PLAIN)
    assert [(s.prefix, s.suffix, s.history) for s in (samples[0], samples[1])] == [
        ("a", "b", ()),
        ("c", "d", (("a", "b"),)),
    ]
    assert pixels(samples, 1) == draw(1).tobytes()


def test_shards_are_one_data_set_by_pattern_braces_and_folder(tmp_path: Path) -> None:
    for shard in range(12):
        write_tar(tmp_path / f"s-{shard:03}.tar", *pair(shard, f"text {shard}"))
    expected = [f"text {shard}" for shard in range(12)]
    for path in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{000..011}.tar", tmp_path / "s-0{0?,1?}.tar"):
        samples = open_data(path, PLAIN)
        assert answers(samples) == expected
        assert pixels(samples, 11) == draw(11).tobytes()
        assert samples[11].picture is not None and samples[11].picture.key == "12:0011"


BAD: list[tuple[Any, str]] = [
    ([("../0002.png", encoded(2)), ("../0002.txt", b"a")], r"\.\./0002\.png: a name that leads out of a folder"),
    ([("/etc/0002.png", encoded(2)), ("/etc/0002.txt", b"a")], "a name that leads out of a folder"),
    ([link("0002.png", "/etc/passwd"), ("0002.txt", b"a")], "0002.png: a link. Regular files were expected"),
    ([link("0002.png", "0001.png", tarfile.LNKTYPE), ("0002.txt", b"a")], "0002.png: a link"),
    ([link("0002.png", "", tarfile.FIFOTYPE), ("0002.txt", b"a")], "0002.png: no regular file"),
    ([("0002.txt", b"a")], r"0002: no picture \(.*Found: txt"),
    ([("0002.png", encoded(2))], "0002: no 'txt'. Found: nothing"),
    ([("0002.png", b""), ("0002.txt", b"a")], "0002.png: an empty file"),
    ([("0002.png", encoded(2)), ("0002.jpg", encoded(2)), ("0002.txt", b"a")], "0002.jpg: a second picture"),
    ([("0002.png", encoded(2)), ("0002.txt", b"\xff")], "0002.txt: not UTF-8"),
    ([("0002.png", encoded(2)), ("0002.txt", b" ")], "0002: 'txt' holds an empty text"),
    ([("0002.png", encoded(2)), ("0002.json", b"{")], "0002.json: broken JSON"),
]


@pytest.mark.parametrize(("members", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_sample_of_a_tar_is_named_or_skipped(tmp_path: Path, members: list[Any], reason: str) -> None:
    path = write_tar(tmp_path / "x.tar", *pair(1, "a"), *members, *pair(3, "c"))
    with pytest.raises(DataError, match=f"x.tar, .*{reason}"):
        open_data(path, PLAIN)
    assert answers(open_data(path, DataSettings(skip_bad=1))) == ["a", "c"]


def test_a_tar_that_is_compressed_cut_or_none_is_named(tmp_path: Path) -> None:
    packed = write_tar(tmp_path / "packed.tar", *pair(1, "a"), mode="w:gz")
    with pytest.raises(DataError, match=r"packed\.tar cannot be read as a tar: .*compressed one .* is unpacked"):
        open_data(packed, PLAIN)
    whole = write_tar(tmp_path / "whole.tar", *pair(1, "a"), *pair(2, "b"))
    for length in (1536 + 100, 3000, 3584 + 200):
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:length])
        with pytest.raises(WeightportError, match=r"cut\.tar"):
            open_data(tmp_path / "cut.tar", PLAIN)
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar"):
        open_data(tmp_path / "empty.tar", PLAIN)


def captions(folder: Path, **changes: Any) -> Path:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(number))
    texts = [(1, "a cat"), (0, "a red square"), (1, "one cat")]
    document = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
        "annotations": [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)],
        **changes,
    }
    path = folder / "captions_train2017.json"
    path.write_text(json.dumps(document), "utf-8")
    return path


def test_coco_captions_are_a_sample_each_and_a_picture_at_a_time_for_evaluation(tmp_path: Path) -> None:
    path = captions(tmp_path)
    samples = open_data(path, PLAIN)
    assert answers(samples) == ["a red square", "a cat", "one cat"]
    grouped = open_data(tmp_path, PLAIN, grouped=True)
    assert [grouped[i].references for i in range(2)] == [("a red square",), ("a cat", "one cat")]
    assert pixels(grouped, 1) == draw(1).tobytes()
    assert samples[2].place == f"{path}, image 1 (1.png)"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": [{"id": 1, "image_id": 7, "caption": "a"}]}, r"annotations\[0\]: no image has the id 7"),
        ({"annotations": [{"id": 1, "image_id": 1, "caption": ""}]}, r"annotations\[0\]: 'caption' holds an empty"),
        ({"images": [{"id": 1}]}, r"no image has the id 0|image 1 \(None\): the name of an image was expected"),
        ({"images": 5}, "COCO captions JSON is an object with the lists images and annotations; images is missing"),
    ],
)
def test_bad_captions_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_data(captions(tmp_path, **changes), PLAIN)
