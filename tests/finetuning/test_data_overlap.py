"""Training and evaluation data that share samples are found by content; those that do not are not suspected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from drawn_data import coco_document, draw_coco, draw_jsonl, draw_muge, encoded, write_lines
from tiny_runs import assigned

from weightport import cli
from weightport.finetuning import overlap
from weightport.finetuning.data import DataSettings, open_data

PLAIN = DataSettings()


def note(training: Path, evaluation: Path, settings: DataSettings = PLAIN) -> str | None:
    return overlap.overlap_note(open_data(training, settings), open_data(evaluation, settings, grouped=True))


def parquet(folder: Path) -> Path:
    folder.mkdir()
    columns = {"image": [{"bytes": encoded(n), "path": None} for n in range(3)], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "json lines": draw_jsonl,
    "muge": lambda folder: draw_muge(folder),
    "coco": draw_coco,
    "parquet": parquet,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_data_are_noticed_in_the_same_place_and_in_a_copy(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "data")
    copy = Path(shutil.copytree(tmp_path / "data", tmp_path / "copy")) / path.name
    for other in (path, copy):
        assert "the evaluation data are the training data" in str(note(path, other))


def test_samples_in_both_are_counted_whatever_their_pictures_are_called(tmp_path: Path) -> None:
    train = draw_jsonl(tmp_path / "train", 6)
    valid = draw_jsonl(tmp_path / "valid", 6)
    rows = [json.loads(line) for line in valid.read_text("utf-8").splitlines()]
    for number in range(6):
        (tmp_path / "valid" / f"{number}.png").rename(tmp_path / "valid" / f"v{number}.png")
    rows = [{**row, "image": f"v{row['image']}"} for row in rows]
    # Another question, another answer, another picture: only the first three are shared.
    rows[3]["prefix"], rows[4]["suffix"] = "what shape?", "square"
    (tmp_path / "valid" / "v5.png").write_bytes(encoded(40))
    found = str(note(train, write_lines(valid, rows)))
    assert "3 of 6 samples" in found and "valid/annotations.jsonl, line 1 and" in found


def test_boxes_and_counts_of_one_picture_in_both_are_noticed(tmp_path: Path) -> None:
    document = coco_document(4)
    train = draw_coco(tmp_path / "train", document)
    few = {**document, "images": document["images"][2:]}
    few["annotations"] = [each for each in document["annotations"] if each["image_id"] >= 2]
    valid = draw_coco(tmp_path / "valid", few)
    for form in ("counting", "detection"):
        assert "2 of 2 samples" in str(note(train, valid, DataSettings(form=form)))


def test_equal_answers_about_other_pictures_are_no_shared_samples(tmp_path: Path) -> None:
    train = draw_jsonl(tmp_path / "train", 4, suffix="yes")
    for number in range(4):
        (tmp_path / "valid").mkdir(exist_ok=True)
        (tmp_path / "valid" / f"{number}.png").write_bytes(encoded(10 + number))
    valid = shutil.copy(train, tmp_path / "valid" / "annotations.jsonl")
    (tmp_path / "valid" / "0.png").write_bytes(encoded(10) + b" ")
    assert note(train, Path(valid)) is None


def test_pictures_that_are_gone_or_too_many_to_read_suspect_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = draw_jsonl(tmp_path / "train", 3)
    valid = draw_jsonl(tmp_path / "valid", 4)
    assert "3 of 4 samples" in str(note(train, valid))
    training, evaluation = open_data(train, PLAIN), open_data(valid, PLAIN, grouped=True)
    (tmp_path / "valid" / "1.png").unlink()
    assert "2 of 4 samples" in str(overlap.overlap_note(training, evaluation))
    monkeypatch.setattr(overlap, "MOST_READ", 0)
    assert overlap.overlap_note(training, evaluation) is None


def test_run_warns_before_its_first_step(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    steps = {"training.max_steps": 1, "training.save_strategy": "no", "training.dataloader_num_workers": 0}
    words = [tiny("florence2"), "--data", pairs, "--eval-data", pairs, "-o", tmp_path / "run", *assigned(steps)]
    done = CliRunner().invoke(cli.port_finetune, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert done.output.index("the evaluation data are the training data") < done.output.index("\nmeasured")
