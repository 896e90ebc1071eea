"""Where pictures may be: several folders, absolute names and links by opt-in, and never a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_data import draw, encoded, write_lines

from weightport.errors import DataError, UsageError
from weightport.finetuning.data import DataSettings, open_data


def place(folder: Path, *numbers: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(encoded(number))
    return folder


def opened(tmp_path: Path, name: str, *images: Path | str) -> bytes:
    path = write_lines(tmp_path / "rows" / "x.jsonl", [{"image": name, "suffix": "a"}])
    settings = DataSettings(images=tuple(map(str, images)) or None)
    picture = open_data(path, settings)[0].picture
    assert picture is not None
    return picture.read().tobytes()


def test_an_absolute_name_needs_a_root_that_allows_it(tmp_path: Path) -> None:
    name = str(place(tmp_path / "store", 1) / "1.png")
    with pytest.raises(DataError, match=r"line 1: .*leads out of the image folder.*data\.images=/"):
        opened(tmp_path, name)
    for root in ("/", tmp_path, tmp_path / "store"):
        assert opened(tmp_path, name, root) == draw(1).tobytes()
    with pytest.raises(
        DataError, match=r"line 1: .*leads out of .*other.*Add the folder that it is in to data\.images"
    ):
        opened(tmp_path, name, place(tmp_path / "other"))
    with pytest.raises(DataError, match="leads out of the image folder"):
        opened(tmp_path, f"{tmp_path}/other/../store/1.png", "/")


def test_names_are_looked_for_in_each_folder_in_order(tmp_path: Path) -> None:
    first, second = place(tmp_path / "a", 1), place(tmp_path / "b", 1, 2)
    (second / "1.png").write_bytes(encoded(5))
    assert opened(tmp_path, "1.png", first, second) == draw(1).tobytes()
    assert opened(tmp_path, "2.png", first, second) == draw(2).tobytes()
    with pytest.raises(DataError, match=r"the image '3.png' is not in .*/a or .*/b: No such file"):
        opened(tmp_path, "3.png", first, second)


def test_relative_names_are_still_beside_the_rows_when_every_absolute_one_is_allowed(tmp_path: Path) -> None:
    place(tmp_path / "rows" / "images", 1)
    assert opened(tmp_path, "1.png", "/") == draw(1).tobytes()


def test_a_linked_folder_is_followed_into_the_roots_alone(tmp_path: Path) -> None:
    store, pictures = place(tmp_path / "store", 1), place(tmp_path / "pictures")
    (pictures / "linked").symlink_to(store)
    with pytest.raises(DataError, match=r"leads out of .* through a symbolic link"):
        opened(tmp_path, "linked/1.png", pictures)
    assert opened(tmp_path, "linked/1.png", pictures, store) == draw(1).tobytes()
    assert opened(tmp_path, "linked/1.png", pictures, "/") == draw(1).tobytes()
    # The folder that is named may be a link itself.
    assert opened(tmp_path, "1.png", pictures / "linked") == draw(1).tobytes()


@pytest.mark.parametrize(
    "name", ["https://a.org/1.png", "s3://bucket/1.png", "file:///tmp/1.png", "data:image/png;base64,A"]
)
def test_a_url_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: .*is a URL .*download them"):
        opened(tmp_path, name, "/")


def test_a_url_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"https://a\.org/x\.jsonl is a URL .*download it first"):
        open_data("https://a.org/x.jsonl", DataSettings())


def test_a_root_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.images is nowhere, which is neither here nor in"):
        opened(tmp_path, "1.png", "nowhere")


def test_rows_without_a_picture_are_text_alone_where_that_is_said(tmp_path: Path) -> None:
    place(tmp_path, 1)
    rows = [{"image": image, "prefix": "q", "suffix": "a"} for image in ("1.png", None, "")] + [
        {"prefix": "q", "suffix": "a"}
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(
        DataError, match=r"line 2: the name of an image was expected, found null.*data\.text_only=true"
    ):
        open_data(path, DataSettings())
    samples = open_data(path, DataSettings(text_only=True))
    assert [samples[i].picture is None for i in range(4)] == [False, True, True, True]
    alone = write_lines(tmp_path / "alone.jsonl", rows[3:])
    assert open_data(alone, DataSettings(text_only=True))[0].picture is None


@pytest.mark.parametrize(
    ("draft", "size"), [(None, (160, 128)), (128, (160, 128)), (64, (80, 64)), (33, (80, 64)), (8, (20, 16))]
)
def test_a_draft_has_at_least_the_pixels_that_are_asked_for(
    tmp_path: Path, draft: int | None, size: tuple[int, int]
) -> None:
    draw(1, (160, 128)).save(tmp_path / "1.jpg", quality=95)
    draw(1, (160, 128)).save(tmp_path / "1.png")
    for name, expected in (("1.jpg", size), ("1.png", (160, 128))):
        path = write_lines(tmp_path / "x.jsonl", [{"image": name, "suffix": "a"}])
        picture = open_data(path, DataSettings())[0].picture
        assert picture is not None and picture.read(draft).size == expected and picture.read(draft).mode == "RGB"
