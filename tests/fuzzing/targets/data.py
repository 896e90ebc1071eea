"""Readers of data sets, held against json, base64 and pyarrow."""

from __future__ import annotations

import base64
import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fuzzing import cases
from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.targets.changes import keeping
from weightport.finetuning.data import DataSettings, open_data
from weightport.finetuning.data.entries import EntrySamples

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "finetuning"))

from drawn_data import coco_document, draw, draw_coco, draw_jsonl, draw_muge, write_lines

SAMPLES = 20


def _with(settings: DataSettings, folder: Path) -> EntrySamples:
    samples = open_data(folder, settings)
    for index in range(min(len(samples), SAMPLES)):
        sample = samples[index]
        if sample.picture is not None:
            sample.picture.read()
    return samples


def _made(folder: Path, name: str, *paths: Path) -> Case:
    return cases.read(folder / name)


def _jsonl_seeds(folder: Path) -> list[Case]:
    draw_jsonl(folder / "plain")
    draw_jsonl(folder / "lists", suffix=["one", "two"])
    (folder / "named").mkdir(parents=True)
    draw(0).save(folder / "named" / "0.png")
    write_lines(folder / "named" / "metadata.jsonl", [{"file_name": "0.png", "text": "a cat", "question": "what?"}])
    return [cases.read(folder / name) for name in ("plain", "lists", "named")]


def _as_json_lines(folder: Path, samples: EntrySamples) -> bool:
    path = next(folder.glob("*.jsonl"))
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line.strip()]
    if len(rows) != len(samples):
        raise MismatchError(f"rows: {len(samples)} samples of {len(rows)} lines")
    for index, row in enumerate(rows[:SAMPLES]):
        sample = samples[index]
        if sample.suffix not in json.dumps(row, ensure_ascii=False) and sample.suffix not in map(str, _leaves(row)):
            raise MismatchError(f"answer: line {index} has no {sample.suffix!r:.80}")
    return True


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, list):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _muge_seeds(folder: Path) -> list[Case]:
    draw_muge(folder / "muge", count=2, captions=2)
    return [cases.read(folder / "muge")]


def _as_base64(folder: Path, samples: EntrySamples) -> bool:
    table: dict[str, str] = {}
    for line in next(folder.glob("*.tsv")).read_bytes().split(b"\n"):
        name, tab, text = line.rstrip(b"\r").partition(b"\t")
        if tab:
            table.setdefault(name.decode(), text.decode().translate(str.maketrans("-_", "+/")).rstrip("="))
    for index in range(min(len(samples), SAMPLES)):
        picture = samples[index].picture
        if picture is None or picture.key not in table:
            continue
        text = table[picture.key]
        if picture.load() != base64.b64decode(text + "=" * (-len(text) % 4)):
            raise MismatchError(f"picture: of {picture.key} differs")
    return True


def _coco_seeds(folder: Path) -> list[Case]:
    draw_coco(folder / "coco")
    document = coco_document()
    for each in document["annotations"]:
        each["area"], each["segmentation"] = 50, []
    draw_coco(folder / "more", document)
    return [cases.read(folder / name) for name in ("coco", "more")]


def _as_counts(folder: Path, samples: EntrySamples) -> bool:
    """How many objects each image has of each class, counted anew."""
    document = json.loads((folder / "_annotations.coco.json").read_bytes())
    names = {each["id"]: each["name"] for each in document["categories"]}
    if len(names) != len(document["categories"]) or len(set(names.values())) != len(names):
        return False
    for index, image in enumerate(document["images"]):
        found = [
            names[each["category_id"]]
            for each in document["annotations"]
            if each.get("image_id") == image["id"] and not each.get("iscrowd")
        ]
        if json.loads(samples[index].suffix) != {name: found.count(name) for name in set(found)}:
            raise MismatchError(f"counts: image {index} has {found} there, {samples[index].suffix} here")
    return True


def _table_seeds(folder: Path) -> list[Case]:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    draw(1).save(stream, "PNG")
    rows = [{"image": {"bytes": stream.getvalue(), "path": None}, "prefix": "what?", "suffix": "red"}] * 2
    target = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    return [{"train.parquet": target.getvalue().to_pybytes()}]


def _as_parquet(folder: Path, samples: EntrySamples) -> bool:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    for index, row in enumerate(rows[:SAMPLES]):
        if samples[index].suffix not in _leaves(row):
            raise MismatchError(f"answer: row {index} is {samples[index].suffix!r:.80} here, {row!r:.80} there")
    return True


_CHANGE = keeping(".png")
_MODULES = ("finetuning/data",)
_COUNT, _DETECT = DataSettings(), DataSettings(form="detection")

TARGETS = (
    Target("jsonl", _jsonl_seeds, _CHANGE, partial(_with, _COUNT), _as_json_lines, _MODULES),
    Target("muge", _muge_seeds, _CHANGE, partial(_with, _COUNT), _as_base64, _MODULES),
    Target("coco-counting", _coco_seeds, _CHANGE, partial(_with, _COUNT), _as_counts, _MODULES),
    Target("coco-detection", _coco_seeds, _CHANGE, partial(_with, _DETECT), modules=_MODULES),
    Target("table", _table_seeds, _CHANGE, partial(_with, _COUNT), _as_parquet, _MODULES),
)
