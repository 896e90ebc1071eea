"""Small data sets that tests draw: pictures by PIL, and annotations of every layout around them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from weightport.finetuning.data import EntrySamples

COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def draw(number: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A picture like no other: `number` decides its colour and where its square is."""
    picture = Image.new("RGB", size, COLOURS[number % len(COLOURS)])
    left = 3 + number % 17
    ImageDraw.Draw(picture).rectangle((left, 4, left + 9, 15), fill="white")
    return picture


def encoded(number: int) -> bytes:
    """The picture as PNG, which keeps every pixel."""
    file = BytesIO()
    draw(number).save(file, "PNG")
    return file.getvalue()


def write_lines(path: Path, rows: Sequence[Mapping[str, Any] | str | bytes]) -> Path:
    """A JSONL file; texts and bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def draw_jsonl(folder: Path, count: int = 4, **row: Any) -> Path:
    """annotations.jsonl with pictures 0 … count - 1 beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(number))
    rows = [
        {"image": f"{number}.png", "prefix": "what colour?", "suffix": COLOURS[number % len(COLOURS)], **row}
        for number in range(count)
    ]
    return write_lines(folder / "annotations.jsonl", rows)


def draw_muge(folder: Path, split: str = "train", count: int = 3, captions: int = 10) -> Path:
    """`split`.jsonl and `split`_imgs.tsv; odd rows of the table are URL-safe base64 without padding."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{split}_imgs.tsv", "wb") as table:
        for number in reversed(range(count)):  # another order than the captions'
            encode = base64.urlsafe_b64encode if number % 2 else base64.b64encode
            text = encode(encoded(number))
            table.write(b"%d\t%s\n" % (1000 + number, text.rstrip(b"=") if number % 2 else text))
    rows = [
        {"image_id": str(1000 + number), "text": [f"图{number} 第{caption}句" for caption in range(captions)]}
        for number in range(count)
    ]
    return write_lines(folder / f"{split}.jsonl", rows)


def coco_document(images: int = 3) -> dict[str, Any]:
    """Image n has n objects of class dime and one penny; the last one has none. Category 0 is Roboflow's group."""
    annotations = [
        {"image_id": image, "category_id": 2 if of_image else 3, "bbox": [1 + of_image, 2, 10, 5], "iscrowd": 0}
        for image in range(images - 1)
        for of_image in range(image + 1)
    ]
    return {
        "info": {},
        "categories": [
            {"id": 0, "name": "currency", "supercategory": "none"},
            {"id": 1, "name": "nickel", "supercategory": "currency"},
            {"id": 2, "name": "dime", "supercategory": "currency"},
            {"id": 3, "name": "penny", "supercategory": "currency"},
        ],
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in range(images)],
        "annotations": [{"id": position, **annotation} for position, annotation in enumerate(annotations)],
    }


def draw_coco(folder: Path, document: Mapping[str, Any] | None = None) -> Path:
    """_annotations.coco.json with its images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    document = document or coco_document()
    for image in document["images"]:
        (folder / image["file_name"]).write_bytes(encoded(image["id"]))
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps(document, indent=1), "utf-8")
    return path


def draw_receipt(number: int, size: tuple[int, int] = (84, 112)) -> tuple[Image.Image, dict[str, Any]]:
    """A receipt of bars for lines of text, and what it says: `number` decides its items and their prices."""
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    items = [
        {"name": ("tea", "rice", "soap")[(number + line) % 3], "price": f"{1 + (number * 7 + line * 3) % 9}.50"}
        for line in range(1 + number % 3)
    ]
    pen.rectangle((0, 0, size[0], 10 + 6 * (number % 4)), fill=COLOURS[number % len(COLOURS)])
    for line, item in enumerate(items):
        pen.rectangle((6, 44 + 16 * line, 6 + 12 * len(item["name"]), 54 + 16 * line), fill="black")
        pen.rectangle((62, 44 + 16 * line, 62 + 2 * int(item["price"][0]), 54 + 16 * line), fill="gray")
    total = sum(float(item["price"]) for item in items)
    return page, {"items": items, "total": f"{total:.2f}"}


def draw_receipts(folder: Path, counts: Mapping[str, int]) -> Path:
    """A folder for each split with its pictures and annotations.jsonl, as the guide's data set has it."""
    number = 0
    for split, count in counts.items():
        rows = []
        (folder / split).mkdir(parents=True)
        for _ in range(count):
            page, content = draw_receipt(number)
            page.save(folder / split / f"receipt_{number}.png")
            suffix = json.dumps(content, ensure_ascii=False)
            rows.append({"image": f"receipt_{number}.png", "prefix": "extract JSON.", "suffix": suffix})
            number += 1
        write_lines(folder / split / "annotations.jsonl", rows)
    return folder


def answers(samples: EntrySamples) -> list[str]:
    """Of every sample, in order."""
    return [samples[i].suffix for i in range(len(samples))]


def pixels(samples: EntrySamples, index: int) -> bytes:
    """Of one sample's picture, as it is read."""
    picture = samples[index].picture
    assert picture is not None
    return picture.read().tobytes()
