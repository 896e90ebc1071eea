"""COCO detection JSON: counting questions with a JSON answer, or the boxes themselves."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.coco_document import (
    Box,
    CocoDocument,
    read_box,
    read_category,
    read_coco,
    read_size,
)
from weightport.finetuning.data.columns import shown
from weightport.finetuning.data.content_keys import Tick, keys_by_content
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import find_image_folder
from weightport.finetuning.data.samples import Objects
from weightport.finetuning.data.settings import DataSettings


class CocoImages:
    """The images of a COCO file, each with its objects; crowds are left out.

    The file is one JSON document, so that opening parses it whole; what is kept are arrays: names, sizes [images, 2],
    boxes [objects, 4]. Checked are categories, boxes and that every image exists; an image with a bad box is a bad
    sample as a whole.
    """

    each_answer = False

    def __init__(self, file: PinnedFile, parsed: Any, settings: DataSettings) -> None:
        path = file.path
        self.name = str(path)
        self.form = settings.form
        faults = Faults(settings.skip_bad)
        document = read_coco(parsed, self.name)
        self.classes = choose_classes(document, settings.classes)
        self.question = counting_question(settings.question, settings.what, self.classes)
        self.images = find_image_folder(
            settings.images, path, next((image.get("file_name") for image in document.images), None), others(path)
        )
        annotations = _by_image(document, faults)

        ids: list[bytes] = []
        names: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        labels: list[int] = []
        boxes: list[Box] = []
        starts = [0]
        stamps: list[tuple[int, int]] = []
        for image in document.images:
            place = self._place(image["id"], image.get("file_name"))
            try:
                _, size_in_bytes, modified = self.images.find(image.get("file_name"), place)
                size, objects = self._read_image(image, annotations[image["id"]], document, place)
            except DataError as fault:
                faults.add(fault)
                continue
            ids.append(str(image["id"]).encode())
            names.append(image["file_name"].encode())
            sizes.append(size)
            labels += [label for label, _ in objects]
            boxes += [box for _, box in objects]
            starts.append(len(labels))
            stamps.append((size_in_bytes, modified))

        self.ids, self.file_names = np.array(ids, dtype=bytes), np.array(names, dtype=bytes)
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self.labels, self.starts = np.array(labels, dtype=np.int32), np.array(starts, dtype=np.int64)
        self.boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        self.answer_counts = np.ones(len(ids), dtype=np.int32)
        self.question_keys = np.arange(len(ids), dtype=np.int64)
        self.skipped = tuple(faults.skipped)
        arrays = (self.ids, self.file_names, self.sizes, self.labels, self.starts, self.boxes)
        digests = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]
        self.content = fingerprint_of(["coco", self.classes, digests, [size for size, _ in stamps]])
        self.fingerprint = fingerprint_of(["coco", file.identity, asdict(settings), stamps])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        names = np.array([key_of(name) for name in self.file_names], dtype=np.int64)
        return keys_by_content(names, self.entry, tick)

    def entry(self, row: int) -> Entry:
        name = self.file_names[row].decode()
        place = self._place(self.ids[row].decode(), name)
        picture = self.images.picture(name, place)
        of_image = slice(int(self.starts[row]), int(self.starts[row + 1]))
        labels = self.labels[of_image]
        if self.form == "counting":
            return Entry(place, picture, self.question, (counting_answer(labels, self.classes),))
        boxes = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in self.boxes[of_image])
        width, height = (int(side) for side in self.sizes[row])
        objects = Objects(tuple(self.classes[label] for label in labels), boxes, (width, height))
        return Entry(place, picture, "", (), objects, self.classes)

    def _read_image(
        self, image: dict[str, Any], annotations: list[dict[str, Any]], document: CocoDocument, place: str
    ) -> tuple[tuple[int, int], list[tuple[int, Box]]]:
        """Size of an image, and class number and box of each of its objects.

        Counting needs neither sizes nor boxes.
        """
        detection = self.form == "detection"
        size = read_size(image, place) if detection or "width" in image else None
        objects = []
        for annotation in annotations:
            here = f"{place}, annotation {annotation.get('id', 'without id')}"
            category = read_category(annotation, document, here)
            if annotation.get("iscrowd") or category not in self.classes:
                continue
            box = read_box(annotation, size, here) if detection or "bbox" in annotation else (0.0, 0.0, 0.0, 0.0)
            objects.append((self.classes.index(category), box))
        return size or (0, 0), objects

    def _place(self, image_id: object, file_name: object) -> str:
        return f"{self.name}, image {image_id} ({shown(file_name)})"


def counting_question(question: str, what: str, classes: tuple[str, ...]) -> str:
    """The question with `{what}` and `{classes}` filled in; other braces stay as they are."""
    values = {"{what}": what, "{classes}": ", ".join(classes)}
    return re.sub(r"\{what\}|\{classes\}", lambda found: values[found[0]], question)


def counting_answer(labels: np.ndarray, classes: tuple[str, ...]) -> str:
    """The counts as JSON, indented by 2, in the order of the class list; absent classes are left out.

    Letters beyond ASCII stand for themselves: escapes would be what the model learns to write.
    """
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    return json.dumps({name: n for name, n in zip(classes, counts) if n}, indent=2, ensure_ascii=False)


def choose_classes(document: CocoDocument, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes in their order: the settings', else the file's.

    A category without an object that only names the group of others is no class: Roboflow writes one at id 0.
    """
    known = tuple(dict.fromkeys(document.categories.values()))
    if chosen is not None:
        missing = [name for name in chosen if name not in known]
        if missing:
            raise DataError(
                f"{document.place}: no category {', '.join(missing)} (data.classes). Found: {', '.join(known)}."
            )
        return chosen
    keys = (annotation.get("category_id") for annotation in document.annotations)
    used = {key for key in keys if isinstance(key, (int, str))}
    empty = {name for key, name in document.categories.items() if key not in used}
    return tuple(name for name in known if name not in empty or name not in document.groups)


def _by_image(document: CocoDocument, faults: Faults) -> dict[Any, list[dict[str, Any]]]:
    """The annotations of each image id, in the file's order."""
    found: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in document.images}
    for position, annotation in enumerate(document.annotations):
        key = annotation.get("image_id")
        if isinstance(key, (int, str)) and key in found:
            found[key].append(annotation)
        else:
            faults.add(
                DataError(f"{document.place}, annotations[{position}]: no image has the id {key!r} that it names.")
            )
    return found


def others(path: Path) -> list[Path]:
    """Where COCO's own layout keeps the images of annotations/instances_val2017.json: in val2017/ beside it."""
    root = path.parent.parent
    split = path.stem.removeprefix("instances_").removeprefix("captions_")
    return [root / split, root / "images" / split, root / "images", root]
