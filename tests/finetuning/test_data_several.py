"""Several data sets as one, patterns of files, and data divided into what is trained and what is measured on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from drawn_data import answers, draw, draw_jsonl, draw_muge, encoded, pixels, write_lines

from weightport.errors import DataError, MissingDataError, RecipeError
from weightport.finetuning.data import DataSettings, EntrySamples, open_data, open_divided
from weightport.finetuning.data.files import MOST_OPEN
from weightport.finetuning.data.hashing import key_of, shares_of
from weightport.finetuning.data.patterns import expand

PLAIN = DataSettings()


def rows(folder: Path, *texts: str, picture: str = "0.png") -> Path:
    """Rows about one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / picture).write_bytes(encoded(len(texts)))
    return write_lines(folder / "x.jsonl", [{"image": picture, "prefix": "q", "suffix": text} for text in texts])


def test_data_sets_of_several_layouts_are_one(tmp_path: Path) -> None:
    first, second = rows(tmp_path / "a", "one", "two"), rows(tmp_path / "b", "three")
    muge = draw_muge(tmp_path / "c")
    samples = open_data([first, second, muge], PLAIN)
    assert answers(samples)[:3] == ["one", "two", "three"] and len(samples) == 3 + len(open_data(muge, PLAIN))
    assert [pixels(samples, i) for i in range(3)] == [draw(n).tobytes() for n in (2, 2, 1)]
    # Pictures of one name are told apart, and rows about them are no one question.
    grouped = open_data([first, second], PLAIN, grouped=True)
    assert [grouped[i].references for i in range(2)] == [("one", "two"), ("three",)]
    keys = {sample.picture.key for sample in (grouped[0], grouped[1]) if sample.picture}
    assert len(keys) == 2


def test_lists_of_answers_stay_one_sample_beside_captions(tmp_path: Path) -> None:
    listed = write_lines(tmp_path / "a" / "x.jsonl", [{"image": "0.png", "suffix": ["a", "b"]}])
    (tmp_path / "a" / "0.png").write_bytes(encoded(0))
    muge = draw_muge(tmp_path / "c")
    assert len(open_data([listed, muge], PLAIN)) == 1 + len(open_data(muge, PLAIN))


def test_bad_samples_of_all_data_sets_are_counted_together(tmp_path: Path) -> None:
    paths = [rows(tmp_path / name, "one", "") for name in "ab"]
    assert len(open_data(paths, DataSettings(skip_bad=2))) == 2
    with pytest.raises(DataError, match="More bad samples than the 1 that --skip-bad allows, in all data sets"):
        open_data(paths, DataSettings(skip_bad=1))


def test_weights_repeat_a_data_set_or_take_a_stable_part_of_it(tmp_path: Path) -> None:
    first, second = rows(tmp_path / "a", "one", "two"), draw_jsonl(tmp_path / "b", 40)
    alone = answers(open_data(second, PLAIN))
    samples = open_data([first, second], DataSettings(weights=(2, 1)))
    assert answers(samples) == ["one", "one", "two", "two", *alone]
    part = open_data([first, second], DataSettings(weights=(1, 0.5)))
    assert 2 + 8 < len(part) < 2 + 32
    taken = [each.place for each in (part[i] for i in range(2, len(part)))]
    more = draw_jsonl(tmp_path / "b", 44)
    again = open_data([first, more], DataSettings(weights=(1, 0.5)))
    assert [each.place for each in (again[i] for i in range(2, len(part)))] == taken
    # What is measured is measured once.
    assert len(open_data([first, second], DataSettings(weights=(2, 2)), grouped=True)) == 1 + 44
    with pytest.raises(RecipeError, match=r"data\.weights has 1 numbers for 2 data sets"):
        open_data([first, second], DataSettings(weights=(2,)))


def test_a_pattern_is_one_data_set_and_one_without_files_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        rows(tmp_path / name, name)
    assert answers(open_data(f"{tmp_path}/*/x.jsonl", PLAIN)) == ["a", "b"]
    assert answers(open_data(f"{tmp_path}/{{b,a}}/x.jsonl", PLAIN)) == ["b", "a"]
    with pytest.raises(MissingDataError, match=r"y\.jsonl: no file fits this pattern\. Looked from"):
        open_data(f"{tmp_path}/*/y.jsonl", PLAIN)
    with pytest.raises(MissingDataError, match=r"c/x\.jsonl does not exist"):
        open_data(f"{tmp_path}/{{a,c}}/x.jsonl", PLAIN)


def test_braces_count_and_choose_as_in_a_shell(tmp_path: Path) -> None:
    assert expand("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand("{a,b}{2..1}") == ["a2", "a1", "b2", "b1"]
    assert expand("{x}") == ["{x}"]
    # A name that exists is that name.
    (tmp_path / "{a,b}").touch()
    assert expand(str(tmp_path / "{a,b}")) == [str(tmp_path / "{a,b}")]
    with pytest.raises(DataError, match="stands for 1,000,000 names"):
        expand("{000000..999999}.tar")


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    count = MOST_OPEN + 20
    for number in range(count):
        write_lines(tmp_path / f"{number:03}.jsonl", [{"image": "0.png", "suffix": f"{number}"}])
    (tmp_path / "0.png").write_bytes(encoded(0))
    before = len(os.listdir("/proc/self/fd"))
    samples = open_data(f"{tmp_path}/*.jsonl", PLAIN)
    assert answers(samples) == [str(number) for number in range(count)]
    assert len(os.listdir("/proc/self/fd")) - before <= MOST_OPEN
    assert answers(samples)[::-1] == [samples[i].suffix for i in reversed(range(count))]
    del samples
    assert len(os.listdir("/proc/self/fd")) <= before


def places(samples: EntrySamples) -> set[str]:
    return {samples[i].place for i in range(len(samples))}


def picture_names(samples: EntrySamples) -> set[str]:
    return {sample.picture.key for sample in (samples[i] for i in range(len(samples))) if sample.picture}


def test_a_share_is_held_out_and_rows_that_are_added_move_none(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 60)
    training, evaluation = open_divided(path, PLAIN, 0.25)
    assert len(training) + len(evaluation) == 60 and 5 <= len(evaluation) <= 25
    before = places(training), places(evaluation)
    assert not before[0] & before[1]
    assert open_divided(path, PLAIN, 0.25)[1].content == evaluation.content != training.content
    longer = draw_jsonl(tmp_path, 80)
    lines = longer.read_text().splitlines()
    more_training, more_evaluation = open_divided(longer, PLAIN, 0.25)
    assert before[0] <= places(more_training) and before[1] <= places(more_evaluation)
    held_out = picture_names(more_evaluation)
    # In another order, too.
    longer.write_text("\n".join(reversed(lines)) + "\n")
    assert picture_names(open_divided(longer, PLAIN, 0.25)[1]) == held_out


def test_all_that_is_asked_about_a_picture_is_on_one_side(tmp_path: Path) -> None:
    draw_jsonl(tmp_path, 30)
    found = [{"image": f"{n % 30}.png", "prefix": f"q{n}", "suffix": "a"} for n in range(90)]
    training, evaluation = open_divided(write_lines(tmp_path / "x.jsonl", found), PLAIN, 0.3)
    pictures = [picture_names(each) for each in (training, evaluation)]
    assert not pictures[0] & pictures[1] and len(pictures[0] | pictures[1]) == 30


def test_weights_hold_for_what_is_trained_on_of_divided_data(tmp_path: Path) -> None:
    paths = [draw_jsonl(tmp_path / name, 30) for name in "ab"]
    training, evaluation = open_divided(paths, DataSettings(weights=(2, 1)), 0.2)
    trained = [training[i].place for i in range(len(training))]
    assert all(trained.count(place) == (2 if "/a/" in place else 1) for place in trained)
    assert len(set(trained)) + len(evaluation) == 60


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, True, "a", float("nan")])
def test_a_share_of_nothing_or_of_all_is_refused(fraction: object) -> None:
    with pytest.raises(RecipeError, match=r"data\.eval_fraction is .*between 0 and 1, such as 0\.05"):
        DataSettings(eval_fraction=fraction)  # type: ignore[arg-type]


def test_a_share_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    path = draw_jsonl(tmp_path, 2)
    with pytest.raises(DataError, match="of 2 rows leaves none to measure on"):
        open_divided(path, PLAIN, 1e-9)
    with pytest.raises(DataError, match="of 2 rows leaves none to train on"):
        open_divided(path, PLAIN, 1 - 1e-9)


def test_shares_are_even_and_one_choice_says_nothing_of_the_next() -> None:
    keys = np.array([key_of(str(number).encode()) for number in range(20_000)], dtype=np.int64)
    held = shares_of(keys, 1) < 0.1
    assert abs(held.mean() - 0.1) < 0.01
    assert abs((shares_of(keys, 2)[held] < 0.5).mean() - 0.5) < 0.05
