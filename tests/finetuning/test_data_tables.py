"""Tables through `datasets`: parquet, saved folders, the Hub (which is replaced here, as there is no network)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_data import draw, draw_jsonl, encoded
from torch.utils.data import DataLoader

from weightport import hub
from weightport.errors import DataError, UsageError
from weightport.finetuning.data import DataSettings, EntrySamples, open_data, open_divided

PLAIN = DataSettings()


def cells(*numbers: int) -> list[dict[str, Any]]:
    return [{"bytes": encoded(number), "path": None} for number in numbers]


def document_questions(count: int = 3) -> dict[str, list[Any]]:
    """Columns as in DocVQA."""
    return {
        "questionId": list(range(count)),
        "question": [f"question {number}?" for number in range(count)],
        "image": cells(*range(count)),
        "answers": [[f"answer {number}", f"Answer {number}."] for number in range(count)],
    }


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def pixels(samples: EntrySamples, index: int) -> bytes:
    picture = samples[index].picture
    assert picture is not None
    return picture.read().tobytes()


def suffixes(samples: EntrySamples) -> list[str]:
    return [samples[i].suffix for i in range(len(samples))]


def test_docvqa_columns_train_on_the_first_answer_and_accept_all(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", document_questions())
    samples = open_data(path, PLAIN)
    assert suffixes(samples) == ["answer 0", "answer 1", "answer 2"]
    assert samples[1].prefix == "question 1?" and samples[1].references == ("answer 1", "Answer 1.")
    assert [pixels(samples, i) == draw(i).tobytes() for i in range(3)] == [True] * 3
    assert samples[1].place == f"{path}, row 2"
    assert len(open_data(path, DataSettings(answer="each"))) == 6
    grouped = open_data(path, DataSettings(answer="each"), grouped=True)
    assert len(grouped) == 3 and grouped[2].references == ("answer 2", "Answer 2.")


def test_image_and_text_columns_are_captions_without_a_question(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", {"image": cells(0, 1), "text": ["Benzema celebrates", "a goal"]})
    samples = open_data(path, PLAIN)
    assert suffixes(samples) == ["Benzema celebrates", "a goal"] and samples[0].prefix == ""


def test_the_settings_name_columns_and_a_missing_one_lists_those_found(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", {"page": cells(0), "frage": ["q"], "antwort": ["a"]})
    settings = DataSettings(image_column="page", prefix_column="frage", suffix_column="antwort")
    samples = open_data(path, settings)
    assert (samples[0].prefix, samples[0].suffix) == ("q", "a") and pixels(samples, 0) == draw(0).tobytes()
    with pytest.raises(DataError, match=r"no column for the image.*found page, frage, antwort"):
        open_data(path, PLAIN)
    with pytest.raises(DataError, match=r"no column 'reply' \(data\.suffix_column\)\. Found: page, frage, antwort"):
        open_data(path, DataSettings(image_column="page", suffix_column="reply"))


def test_shards_patterns_and_splits_of_folders(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("validation", 1)):
        for shard in range(count):
            write_parquet(tmp_path / "data" / f"{split}-0000{shard}-of-0000{count}.parquet", document_questions())
    assert len(open_data(tmp_path, DataSettings(split="train"))) == 6
    assert len(open_data(tmp_path, DataSettings(split="val"))) == 3
    assert len(open_data(str(tmp_path / "data" / "train-*.parquet"), PLAIN)) == 6
    with pytest.raises(DataError, match=r"has the splits train, valid.*data\.split"):
        open_data(tmp_path, PLAIN)
    with pytest.raises(DataError, match=r"has no split holdout\. Found: train, valid"):
        open_data(tmp_path, DataSettings(split="holdout"))
    with pytest.raises(DataError, match="no file fits this pattern"):
        open_data(str(tmp_path / "data" / "dev-*.parquet"), PLAIN)
    write_parquet(tmp_path / "data" / "train-x.parquet", {"image": cells(0), "text": ["a"]})
    with pytest.raises(DataError, match=r"train-x\.parquet has the columns image, text; .* has questionId"):
        open_data(tmp_path, DataSettings(split="train"))


def test_saved_folders_open_with_their_image_feature(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(document_questions()).cast_column("image", datasets.Image())
    table.with_format("numpy").save_to_disk(tmp_path / "one")
    samples = open_data(tmp_path / "one", PLAIN)
    assert suffixes(samples) == ["answer 0", "answer 1", "answer 2"] and pixels(samples, 2) == draw(2).tobytes()
    datasets.DatasetDict({"train": table, "validation": table.select([1])}).save_to_disk(tmp_path / "two")
    assert suffixes(open_data(tmp_path / "two", DataSettings(split="valid"))) == ["answer 1"]
    with pytest.raises(DataError, match="has the splits train, validation"):
        open_data(tmp_path / "two", PLAIN)


@pytest.mark.parametrize("place", ["../one/data-00000-of-00001.arrow", "/etc/hostname", ".."])
def test_a_saved_folder_may_not_name_files_elsewhere(tmp_path: Path, place: str) -> None:
    datasets.Dataset.from_dict(document_questions()).save_to_disk(tmp_path / "one")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"][0]["filename"] = place
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"state\.json names .* no file beside it"):
        open_data(tmp_path / "one", PLAIN)


@pytest.mark.parametrize("kind", ["bytes", "names", "paths"])
def test_images_may_be_plain_bytes_or_names_of_files_beside_the_table(tmp_path: Path, kind: str) -> None:
    draw_jsonl(tmp_path, 2)
    names = ["0.png", "1.png"]
    column = {
        "bytes": [encoded(0), encoded(1)],
        "names": names,
        "paths": [{"bytes": None, "path": name} for name in names],
    }[kind]
    table = pa.table({"image": column, "text": ["a", "b"]})
    if kind == "paths":
        kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = table.set_column(0, "image", pa.array(column, type=kinds))
    pq.write_table(table, tmp_path / "x.parquet")
    samples = open_data(tmp_path / "x.parquet", PLAIN)
    assert [pixels(samples, i) == draw(i).tobytes() for i in range(2)] == [True] * 2


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"answers": []}, "'answers' is empty"),
    ({"answers": None}, "'answers' is empty"),
    ({"answers": ["a", " "]}, "'answers' holds an empty text"),
    ({"question": None}, "'question' holds null"),
    ({"image": None}, "'image' holds no image"),
    ({"image": {"bytes": None, "path": None}}, "'image' holds no image"),
    ({"image": {"bytes": b"", "path": None}}, "'image' holds no image"),
    ({"image": {"bytes": None, "path": "gone.png"}}, "the image 'gone.png' is not in"),
    ({"image": {"bytes": None, "path": "/etc/hostname"}}, "leads out of the image folder"),
    ({"image": {"bytes": None, "path": "../x.png"}}, "leads out of the image folder"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    columns = document_questions()
    for name, value in change.items():
        columns[name][1] = value
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array(columns.pop("image"), type=struct)
    pq.write_table(pa.table({**columns, "image": images}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=rf"x\.parquet, row 2: .*{reason}"):
        open_data(str(tmp_path / "x.parquet"), PLAIN)
    samples = open_data(tmp_path / "x.parquet", DataSettings(skip_bad=1))
    assert suffixes(samples) == ["answer 0", "answer 2"] and pixels(samples, 1) == draw(2).tobytes()
    assert samples[1].place.endswith("row 3") and "row 2" in samples.skipped[0]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": [1], "text": ["a"]}, "'image' holds int64. Images were expected"),
        ({"image": [[1]], "text": ["a"]}, "'image' holds list.*Images were expected"),
        ({"image": [cells(0, 1)], "text": ["a"]}, "row 1: 2 pictures. One a sample was expected"),
        ({"image": [[], cells(1)], "text": ["a", "b"]}, "row 1: 'image' holds no image"),
        ({"image": cells(0), "label": [True]}, "'label' holds true or false where a text was expected"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path: Path, columns: dict[str, list[Any]], reason: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(DataError, match=reason):
        open_data(path, PLAIN)


def test_what_is_no_parquet_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as parquet"):
        open_data(str(tmp_path / "x.parquet"), PLAIN)
    table = pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"y\.parquet has no samples"):
        open_data(tmp_path / "y.parquet", PLAIN)


def test_a_picture_in_a_table_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": [b"no picture"], "text": ["a"]})
    with pytest.raises(DataError, match=r"x\.parquet, row 1: the image row 1 cannot be read as a picture"):
        pixels(open_data(path, PLAIN), 0)


def test_tables_pickle_and_two_workers_read_them(tmp_path: Path) -> None:
    samples = open_data(write_parquet(tmp_path / "x.parquet", document_questions(5)), PLAIN)
    assert len(pickle.dumps(samples)) < 20_000
    loader: DataLoader[Any] = DataLoader(
        samples, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    found = [(sample.suffix, sample.picture.read().tobytes()) for batch in loader for sample in batch]
    assert found == [(f"answer {i}", draw(i).tobytes()) for i in range(5)]


class Hub:
    """Stands for the Hub: one data set with two splits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.table = datasets.Dataset.from_dict(document_questions()).cast_column("image", datasets.Image())
        monkeypatch.setattr(hub, "why_unreachable", lambda: None)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "validation"])
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, *what: Any, **options: Any) -> datasets.Dataset:
        self.asked.append((what, options))
        return self.table


def test_a_hub_data_set_is_read_by_name_split_subset_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Hub(monkeypatch)
    samples = open_data("owner/name", DataSettings(split="train", subset="DocVQA", revision="abc"))
    assert suffixes(samples) == ["answer 0", "answer 1", "answer 2"] and pixels(samples, 1) == draw(1).tobytes()
    assert samples.name == "owner/name" and samples[0].place == "owner/name, row 1"
    open_data("owner/name:validation", PLAIN)
    assert known.asked == [
        (("owner/name", "DocVQA"), {"split": "train", "revision": "abc"}),
        (("owner/name", None), {"split": "validation", "revision": None}),
    ]
    with pytest.raises(DataError, match=r"owner/name has the splits train, validation.*data\.split"):
        open_data("owner/name", PLAIN)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach it"), "no file or folder here, and .* cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("doesn't exist"), "cannot be read as a table: doesn't exist"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
        (ValueError("Unknown split"), "Unknown split"),
    ],
)
def test_what_the_hub_answers_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=f"owner/name .*{message}"):
        open_data("owner/name", DataSettings(split="train"))


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", document_questions())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[finetune\]' in weightport's checkout"):
        open_data(path, PLAIN)


def test_files_that_datasets_put_into_its_cache_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "cache" / "downloads" / "0.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(encoded(3))
    path = write_parquet(tmp_path / "x.parquet", {"image": [str(file)], "text": ["a"]})
    assert pixels(open_data(path, PLAIN), 0) == draw(3).tobytes()


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data[1]" / "x.parquet", document_questions())
    assert len(open_data(tmp_path / "data[1]", PLAIN)) == 3


def test_a_home_that_cannot_be_written_is_not_taken_for_a_table_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    write_parquet(tmp_path / "x.parquet", {"image": cells(1), "suffix": ["a"]})
    with pytest.raises(DataError, match=r"keeps tables in .*/file/cache, which cannot be written.*HF_DATASETS_CACHE"):
        open_data(str(tmp_path / "x.parquet"), PLAIN)


def test_a_scripts_code_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "name.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for reader in ("auto", "table"):
        with pytest.raises(DataError, match=r"Looked for|no table here"):
            open_data(folder, DataSettings(reader=reader))
    assert not (tmp_path / "ran").exists()


def test_chats_and_lists_of_one_picture_are_read_from_tables(tmp_path: Path) -> None:
    def chat(number: int) -> list[dict[str, Any]]:
        parts = [{"type": "image", "text": None}, {"type": "text", "text": f"what is {number}?"}]
        answer = [{"type": "text", "text": f"answer {number}"}]
        more = [{"type": "text", "text": "sure?"}], [{"type": "text", "text": "yes"}]
        contents = [parts, answer, *more]
        return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]

    rows = {"messages": [chat(0), chat(1)], "images": [cells(3), cells(4)]}
    samples = open_data(write_parquet(tmp_path / "train.parquet", rows), PLAIN)
    assert suffixes(samples) == ["answer 0", "yes", "answer 1", "yes"]
    assert samples[3].prefix == "sure?" and samples[3].history == (("what is 1?", "answer 1"),)
    assert samples[3].place.endswith("row 2, answer 2") and pixels(samples, 3) == draw(4).tobytes()
    grouped = open_data(tmp_path / "train.parquet", PLAIN, grouped=True)
    assert suffixes(grouped) == suffixes(samples)
    assert open_divided(tmp_path / "train.parquet", PLAIN, 0.5)


def test_numbers_of_classes_are_answered_with_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": cells(0, 1), "label": [1, 0]}, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    assert suffixes(open_data(tmp_path / "saved", PLAIN)) == ["dog", "cat"]
    plain = write_parquet(tmp_path / "x.parquet", {"image": cells(0, 1), "label": [1, 0]})
    assert suffixes(open_data(plain, PLAIN)) == ["1", "0"]


def test_a_table_is_divided_by_the_bytes_of_its_pictures(tmp_path: Path) -> None:
    rows = {"image": cells(*range(20), *range(20)), "text": [f"text {n}" for n in range(40)]}
    training, evaluation = open_divided(write_parquet(tmp_path / "x.parquet", rows), PLAIN, 0.4)
    shown = [{pixels(each, i) for i in range(len(each))} for each in (training, evaluation)]
    assert len(training) + len(evaluation) == 40 and not shown[0] & shown[1]
