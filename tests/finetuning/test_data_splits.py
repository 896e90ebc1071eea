"""A split that is not there is an error that lists the splits: nothing else is taken in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_data import draw_coco, draw_jsonl, draw_muge, encoded

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, open_data

PLAIN = DataSettings()


def write_parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": encoded(0), "path": None}], "text": ["a"]}), path)
    return path


def saved(folder: Path, split: str | None = None) -> Path:
    datasets.Dataset.from_dict({"image": [encoded(0)], "text": ["a"]}, split=split).save_to_disk(folder)
    return folder


def coco_of_2017(folder: Path) -> Path:
    """COCO's own layout, with the training annotations alone."""
    (folder / "annotations").mkdir(parents=True)
    draw_coco(folder).rename(folder / "annotations" / "instances_train2017.json")
    return folder


ABSENT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (lambda folder: draw_jsonl(folder), "Found: no splits, one whole"),
    "a file of another split": (lambda folder: draw_muge(folder) and folder / "train.jsonl", "Found: train"),
    "a file in another split's folder": (lambda folder: draw_jsonl(folder / "train"), "Found: train"),
    "a coco file": (lambda folder: draw_coco(folder), "Found: no splits, one whole"),
    "a parquet file": (lambda folder: write_parquet(folder / "x.parquet"), "Found: no splits, one whole"),
    "a folder": (lambda folder: draw_jsonl(folder).parent, "Found: no splits, one whole"),
    "a folder of one split": (lambda folder: draw_jsonl(folder / "train").parents[1], "Found: train"),
    "another split's folder": (lambda folder: draw_jsonl(folder / "train").parent, "Found: train"),
    "a folder of coco's splits": (lambda folder: draw_coco(folder / "train").parents[1], "Found: train"),
    "coco's own folder": (coco_of_2017, "Found: train"),
    "muge's folder": (lambda folder: draw_muge(folder).parent, "Found: train"),
    "a folder of parquet": (lambda folder: write_parquet(folder / "x.parquet").parent, "Found: no splits, one whole"),
    "a parquet folder of one split": (
        lambda folder: write_parquet(folder / "data" / "train-00000-of-00001.parquet").parents[1], "Found: train"
    ),
    "a folder with a parquet folder": (lambda folder: write_parquet(folder / "train/x.parquet").parents[1], ""),
    "a saved table": (lambda folder: saved(folder / "table"), "Found: no splits, one whole"),
    "a saved table of one split": (lambda folder: saved(folder / "table", "train"), "Found: train"),
}  # fmt: skip


@pytest.mark.parametrize("what", ABSENT)
def test_split_that_is_not_there_gives_no_other_data(what: str, tmp_path: Path) -> None:
    make, found = ABSENT[what]
    place = make(tmp_path / "data")
    for split in ("valid", "validation", "holdout"):
        with pytest.raises(DataError, match=rf"has no split {split}\. {found}"):
            open_data(f"{place}:{split}", PLAIN)
        with pytest.raises(DataError, match=rf"has no split {split}\. {found}"):
            open_data(place, DataSettings(split=split))


def test_pattern_of_files_has_no_split_that_none_of_them_is_of(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet")
    write_parquet(tmp_path / "train-1.parquet")
    assert len(open_data(f"{tmp_path}/*.parquet:train", PLAIN)) == 2
    with pytest.raises(DataError, match=r"has no split valid\. Found: train"):
        open_data(f"{tmp_path}/*.parquet:valid", PLAIN)


def test_split_that_is_named_by_a_file_or_its_folder_is_there(tmp_path: Path) -> None:
    draw_muge(tmp_path / "muge", "valid")
    draw_jsonl(tmp_path / "dev")
    write_parquet(tmp_path / "tables" / "val" / "x.parquet")
    places: list[Any] = [tmp_path / "muge", tmp_path / "muge/valid.jsonl", tmp_path / "dev/annotations.jsonl"]
    places += [tmp_path / "dev", tmp_path / "tables", tmp_path / "tables/val", tmp_path / "tables/val/x.parquet"]
    places += [saved(tmp_path / "saved", "validation"), coco_of_2017(tmp_path / "coco").parent / "dev"]
    for place in places:
        assert len(open_data(f"{place}:validation", PLAIN)), place
    assert len(open_data(f"{tmp_path / 'coco'}:train", PLAIN)) == 3


def test_hub_lists_its_splits_and_knows_valid_as_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"image": [encoded(0)], "text": ["a"]})

    def load(*_: Any, split: str, **__: Any) -> datasets.Dataset:
        if split not in ("train", "validation"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'validation'].")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "validation"])
    assert len(open_data("owner/name:valid", PLAIN)) == 1
    with pytest.raises(DataError, match=r"owner/name has no split test\. Found: train, validation"):
        open_data("owner/name:test", PLAIN)
