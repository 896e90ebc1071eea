"""Readers of data sets, held against json, base64 and pyarrow."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from fuzzing import cases
from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.targets.changes import change, keeping
from weightport.finetuning.data import DataSettings, open_data
from weightport.finetuning.data.chats import CHATS
from weightport.finetuning.data.entries import EntrySamples

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "finetuning"))

from drawn_data import coco_document, draw, draw_coco, draw_jsonl, draw_muge, encoded, write_lines

SAMPLES = 20
_COUNT, _DETECT = DataSettings(), DataSettings(form="detection")


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
    lines = [line for line in path.read_bytes().decode().split("\n") if line.strip()]
    rows = [json.loads(line) for line in lines]
    if any(name in rows[0] for name in CHATS):
        return False
    if len(rows) != len(samples):
        raise MismatchError(f"rows: {len(samples)} samples of {len(rows)} lines")
    for index, row in enumerate(rows[:SAMPLES]):
        sample = samples[index]
        # A number is an answer as it is written.
        if sample.suffix not in lines[index] and sample.suffix not in map(str, _leaves(row)):
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


def _csv_seeds(folder: Path) -> list[Case]:
    texts = {
        "commas": "image,question,answer\n0.png,what?,a cat\n1.png,,5\n",
        "quotes": 'image;text\r\n1.png;"two\r\nlines, ""quoted"""\r\n',
    }
    for name, text in texts.items():
        draw_jsonl(folder / name, 2).unlink()
        (folder / name / "metadata.csv").write_bytes(text.encode())
    return [cases.read(folder / name) for name in texts]


def _as_csv(folder: Path, samples: EntrySamples) -> bool:
    """Every answer stands in the file, but for the quotes that are doubled in it."""
    content = (folder / "metadata.csv").read_bytes().decode().replace('""', '"')
    for index in range(min(len(samples), SAMPLES)):
        if samples[index].suffix.replace('""', '"') not in content:
            raise MismatchError(f"answer: {samples[index].suffix!r:.80} is not in the file")
    return True


def _list_seeds(folder: Path) -> list[Case]:
    rows = [{"image": "0.png", "prefix": "what?", "suffix": "a cat"}, {"image": "1.png", "prefix": "q", "suffix": 1.5}]
    made = []
    for name, indent in (("flat", None), ("indented", 1)):
        draw_jsonl(folder / name, 2).unlink()
        (folder / name / "train.json").write_text(json.dumps(rows, indent=indent))
        made.append(cases.read(folder / name))
    return made


def _list_samples(folder: Path) -> EntrySamples:
    return _with(_COUNT, folder / "train.json")


def _as_list(folder: Path, samples: EntrySamples) -> bool:
    """The whole document, read at once."""
    rows = json.loads((folder / "train.json").read_bytes().decode("utf-8-sig"))
    if any(name in rows[0] for name in CHATS):
        return False
    if len(rows) != len(samples):
        raise MismatchError(f"rows: {len(samples)} samples of {len(rows)} objects")
    return True


def _chat_seeds(folder: Path) -> list[Case]:
    turns = [("user", "<image>what?"), ("assistant", "a cat"), ("user", "where?"), ("assistant", "here")]
    chats = {
        "messages": {"messages": [{"role": role, "content": text} for role, text in turns], "images": ["0.png"]},
        "llava": {"conversations": [{"from": role, "value": text} for role, text in turns], "image": "0.png"},
    }
    made = []
    for name, row in chats.items():
        draw_jsonl(folder / name, 1).unlink()
        write_lines(folder / name / "train.jsonl", [row] * 2)
        made.append(cases.read(folder / name))
    return made


def _tar_seeds(folder: Path) -> list[Case]:
    row = json.dumps({"question": "what?", "answer": "a cat"}).encode()
    made = []
    for ending, content in (("txt", b"a cat"), ("json", row)):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for number in range(2):
                for name, data in ((f"{number}.png", encoded(number)), (f"{number}.{ending}", content)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        made.append({"train.tar": stream.getvalue()})
    return made


def _as_tar(folder: Path, samples: EntrySamples) -> bool:
    """The bytes of every picture, as tarfile has them by name."""
    with tarfile.open(folder / "train.tar", "r:") as archive:
        held = [archive.extractfile(member).read() for member in archive if member.isreg()]  # type: ignore[union-attr]
    for index in range(min(len(samples), SAMPLES)):
        picture = samples[index].picture
        if picture is not None and picture.load() not in held:
            raise MismatchError(f"picture: of {picture.key!r} is no member")
    return True


def _classes_seeds(folder: Path) -> list[Case]:
    for number, name in enumerate(("cat", "dog")):
        (folder / "classes" / name).mkdir(parents=True)
        draw(number).save(folder / "classes" / name / f"{number}.png")
    return [cases.read(folder / "classes")]


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

TARGETS = (
    Target("jsonl", _jsonl_seeds, _CHANGE, partial(_with, _COUNT), _as_json_lines, _MODULES),
    Target("csv", _csv_seeds, _CHANGE, partial(_with, _COUNT), _as_csv, _MODULES),
    Target("json-list", _list_seeds, _CHANGE, _list_samples, _as_list, _MODULES),
    Target("chats", _chat_seeds, _CHANGE, partial(_with, _COUNT), modules=_MODULES),
    Target("tar", _tar_seeds, _CHANGE, partial(_with, _COUNT), _as_tar, _MODULES),
    Target("classes", _classes_seeds, change, partial(_with, _COUNT), modules=_MODULES),
    Target("muge", _muge_seeds, _CHANGE, partial(_with, _COUNT), _as_base64, _MODULES),
    Target("coco-counting", _coco_seeds, _CHANGE, partial(_with, _COUNT), _as_counts, _MODULES),
    Target("coco-detection", _coco_seeds, _CHANGE, partial(_with, _DETECT), modules=_MODULES),
    Target("table", _table_seeds, _CHANGE, partial(_with, _COUNT), _as_parquet, _MODULES),
)
