"""COCO captions: captions_*.json, whose annotations are texts about the images."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.coco import CocoImages, others
from weightport.finetuning.data.coco_document import has_captions, parse_document, read_parts
from weightport.finetuning.data.columns import answers_of, shown
from weightport.finetuning.data.content_keys import Tick, keys_by_content
from weightport.finetuning.data.entries import Entry, Source
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import find_image_folder
from weightport.finetuning.data.packed_texts import PackedTexts
from weightport.finetuning.data.settings import DataSettings


def open_coco(file: PinnedFile, settings: DataSettings) -> Source:
    """Captions or objects, as the annotations are."""
    parsed = parse_document(file)
    return (CocoCaptions if has_captions(parsed) else CocoImages)(file, parsed, settings)


class CocoCaptions:
    """The images of a captions file that have captions. For training, every pair of an image and a caption is a
    sample.

    The file is one JSON document, so that opening parses it whole; what is kept are texts in arrays.
    """

    each_answer = True

    def __init__(self, file: PinnedFile, parsed: Any, settings: DataSettings) -> None:
        path = file.path
        self.name = str(path)
        faults = Faults(settings.skip_bad)
        parts = read_parts(parsed, ("images", "annotations"), self.name)
        first = next((image.get("file_name") for image in parts["images"]), None)
        self.images = find_image_folder(settings.images, path, first, others(path))
        captions = self._captions(parts, faults)
        rows, stamps = [], []
        for image in parts["images"]:
            texts = captions[image["id"]]
            if not texts:
                continue
            try:
                name, size, modified = self.images.look_up(image.get("file_name"), self._place(image["id"], image))
            except DataError as fault:
                faults.add(fault)
                continue
            rows.append((str(image["id"]), name, texts))
            stamps.append((size, modified))
        self.ids = PackedTexts(number for number, _, _ in rows)
        self.names = PackedTexts(name for _, name, _ in rows)
        self.texts = PackedTexts(text for _, _, texts in rows for text in texts)
        self.answer_counts = np.array([len(texts) for _, _, texts in rows], dtype=np.int32)
        self.ends = np.cumsum(self.answer_counts, dtype=np.int64)
        self.question_keys = np.arange(len(rows), dtype=np.int64)
        self.skipped = tuple(faults.skipped)
        arrays = (self.names.content, self.names.ends, self.texts.content, self.texts.ends, self.answer_counts)
        digests = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
        self.content = fingerprint_of(["captions", digests, [size for size, _ in stamps]])
        self.fingerprint = fingerprint_of(["captions", file.identity, asdict(settings), stamps])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        names = np.array([key_of(self.names[row].encode()) for row in range(len(self.names))], dtype=np.int64)
        return keys_by_content(names, self.entry, tick)

    def entry(self, row: int) -> Entry:
        name = self.names[row]
        place = self._place(self.ids[row], {"file_name": name})
        end = int(self.ends[row])
        texts = tuple(self.texts[number] for number in range(end - int(self.answer_counts[row]), end))
        return Entry(place, self.images.picture(name, place), "", texts)

    def _captions(self, parts: dict[str, list[dict[str, Any]]], faults: Faults) -> dict[Any, list[str]]:
        """The captions of each image id, in the file's order."""
        found: dict[Any, list[str]] = {image["id"]: [] for image in parts["images"]}
        for position, annotation in enumerate(parts["annotations"]):
            place = f"{self.name}, annotations[{position}]"
            try:
                key = annotation.get("image_id")
                if not isinstance(key, (int, str)) or key not in found:
                    raise DataError(f"{place}: no image has the id {key!r} that it names.")
                found[key] += answers_of(annotation, "caption", place)
            except DataError as fault:
                faults.add(fault)
        return found

    def _place(self, image_id: object, image: dict[str, Any]) -> str:
        return f"{self.name}, image {image_id} ({shown(image.get('file_name'))})"
