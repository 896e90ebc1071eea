"""Readers of data sets, held against json, base64 and pyarrow."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import sys
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import cases, mutation
from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.targets.changes import keeping
from weightport.finetuning.data import DataSettings, open_data
from weightport.finetuning.data.coco_captions import CocoCaptions
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


def _chat_seeds(folder: Path) -> list[Case]:
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what?"}]
    told = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}] * 2
    told[2] = {"from": "human", "value": "and now?"}
    rows = {
        "plain": {"image": "0.png", "messages": messages},
        "parts": {"messages": [{"role": "user", "content": parts}, messages[1]]},
        "llava": {"id": 1, "image": "0.png", "conversations": told},
    }
    made = []
    for name, row in rows.items():
        (folder / name).mkdir(parents=True)
        draw(0).save(folder / name / "0.png")
        write_lines(folder / name / "train.jsonl", [row, row])
        made.append(cases.read(folder / name))
    return made


def _list_seeds(folder: Path) -> list[Case]:
    """The same rows as a JSON list, as CSV and as TSV."""
    (folder / "x").mkdir(parents=True)
    draw(0).save(folder / "x" / "0.png")
    picture = {"0.png": (folder / "x" / "0.png").read_bytes()}
    row = {"image": "0.png", "prefix": "what?", "suffix": "red"}
    quoted = b'image,prefix,suffix\n0.png,"what, and ""why""?",red\n0.png,"two\nlines",blue\n'
    return [
        {"train.json": json.dumps([row, row]).encode(), **picture},
        {"train.csv": quoted, **picture},
        {"train.tsv": b"image\tprefix\tsuffix\n0.png\twhat?\tred\n", **picture},
    ]


def _as_csv(folder: Path, samples: EntrySamples) -> bool:
    path = folder / "train.csv"
    if not path.is_file():
        return False
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    rows = [
        row for row in rows if any(value and str(value).strip() for value in row.values())
    ]  # a line of blanks is none
    for index, row in enumerate(rows[:SAMPLES]):
        if index >= len(samples) or samples[index].suffix not in map(str, row.values()):
            raise MismatchError(f"answer: row {index} is {row!r:.80} there")
    return True


def _captions_seeds(folder: Path) -> list[Case]:
    document = coco_document()
    document["annotations"] = [{"id": n, "image_id": n % 3, "caption": f"a picture {n}"} for n in range(4)]
    draw_coco(folder / "captions", document)
    return [cases.read(folder / "captions")]


def _as_captions(folder: Path, samples: EntrySamples) -> bool:
    # A number is an answer as it is written: 1.50 has four characters.
    document = json.loads((folder / "_annotations.coco.json").read_bytes(), parse_float=str, parse_int=str)
    if not isinstance(samples.source, CocoCaptions):
        return False
    texts = [text for each in document["annotations"] for text in _leaves(each.get("caption"))]
    for index in range(min(len(samples), SAMPLES)):
        if samples[index].suffix not in texts:
            raise MismatchError(f"caption: {samples[index].suffix!r:.80} is no caption there")
    return True


def _tar_seeds(folder: Path) -> list[Case]:
    stream = io.BytesIO()
    draw(1).save(stream, "PNG")
    members = {}
    for number in range(2):
        members |= {f"{number:05}.png": stream.getvalue(), f"{number:05}.txt": b"a cat"}
    members |= {"2.png": stream.getvalue(), "2.json": b'{"prefix": "what?", "suffix": "red"}'}
    texts = {name: data for name, data in members.items() if not name.startswith("2.")}
    return [{"train.tar": _tar(texts)}, {"train.tar": _tar(dict(list(members.items())[-2:]))}]


def _tar(members: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _tar_change(rng: Random, case: Case, corpus: list[Case]) -> Case:
    """Bytes of the archive, or a member's name, kind or content, packed again."""
    data = case["train.tar"]
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = [(info, (archive.extractfile(info) or io.BytesIO()).read()) for info in archive if info.isreg()]
    except (tarfile.TarError, EOFError, ValueError, OSError):
        members = []
    if not members or rng.random() < 0.4:
        return {"train.tar": mutation.of_bytes(rng, data)}
    stream, at = io.BytesIO(), rng.randrange(len(members))
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    with tarfile.open(fileobj=stream, mode="w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT))) as made:
        for number, (info, content) in enumerate(members):
            if number == at:
                choice = rng.randrange(4)
                if choice == 0:
                    info.name = mutation.of_text(rng, os.fsencode(info.name)).decode("utf-8", "surrogateescape")[:90]
                elif choice == 1:
                    info.type, info.linkname = rng.choice(kinds), rng.choice(("../x", "/etc/passwd", "00000.png"))
                else:
                    content = mutation.of_json(rng, content) if info.name.endswith("json") else b"" + content[::-1]
            info.size = len(content) if info.isreg() else 0
            try:
                made.addfile(info, io.BytesIO(content))
            except (ValueError, UnicodeError, OSError):
                return case
    return {"train.tar": stream.getvalue()}


def _class_seeds(folder: Path) -> list[Case]:
    for number in range(3):
        place = folder / "classes" / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        draw(number).save(place / f"{number}.png")
    return [cases.read(folder / "classes")]


def _class_change(rng: Random, case: Case, corpus: list[Case]) -> Case:
    """Names of folders and files, and bytes of pictures."""
    made = dict(case)
    name = rng.choice(list(made))
    content = made.pop(name)
    if rng.random() < 0.5:
        made[name] = mutation.of_bytes(rng, content)
        return made
    other = mutation.of_text(rng, os.fsencode(name)).decode("utf-8", "surrogateescape").replace("\0", "")
    parts = [part[:200] for part in other.split("/") if part not in ("", ".", "..")][:4]
    if not parts or any("/".join(parts[:depth]) in made for depth in range(1, len(parts) + 1)):
        return case
    made["/".join(parts)] = content
    return case if any(each.startswith("/".join(parts) + "/") for each in made) else made


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
    Target("chats", _chat_seeds, _CHANGE, partial(_with, _COUNT), modules=_MODULES),
    Target("csv-and-lists", _list_seeds, _CHANGE, partial(_with, _COUNT), _as_csv, _MODULES),
    Target("coco-captions", _captions_seeds, _CHANGE, partial(_with, _COUNT), _as_captions, _MODULES),
    Target("tar", _tar_seeds, _tar_change, partial(_with, _COUNT), modules=_MODULES),
    Target("class-folders", _class_seeds, _class_change, partial(_with, _COUNT), modules=_MODULES),
    Target("table", _table_seeds, _CHANGE, partial(_with, _COUNT), _as_parquet, _MODULES),
)
