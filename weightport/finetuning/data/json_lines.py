"""JSONL {"image", "prefix", "suffix"} with the images in a folder: the layout of the PaliGemma 2 guide."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.columns import answers_of, find_columns, parse_object, question_of, value_of
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import Line, PinnedFile, index_lines
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import ImageFolder, find_image_folder
from weightport.finetuning.data.line_rows import LineRows
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.data.settings import DataSettings


class JsonLines(LineRows):
    """A JSONL file and its image folder. `suffix` is a text or a list of accepted texts; `prefix` may be left out.

    Opening reads the file once and checks every line and that its image exists; no picture is decoded.
    """

    each_answer = False

    def __init__(self, path: Path, settings: DataSettings) -> None:
        self.name = str(path)
        faults = Faults(settings.skip_bad)
        file = PinnedFile(path)
        sample = first_object(file)
        self.columns = find_columns(tuple(sample), settings, self.name)
        self.images: ImageFolder = find_image_folder(settings.images, path, sample[self.columns.image])
        images_seen, rows_seen = hashlib.blake2b(), hashlib.blake2b()

        def examine(line: Line) -> tuple[int, int]:
            place = self.place_of(line)
            row = parse_object(line.content, place)
            image = value_of(row, self.columns.image, place)
            question = question_of(row, self.columns.prefix, place)
            answers = answers_of(row, self.columns.suffix, place)
            _, size, modified = self.images.find(image, place)
            images_seen.update(f"{image}\0{size}\0{modified}\n".encode())
            rows_seen.update(f"{image!r} {size} {question!r} {answers!r}\n".encode())
            return len(answers), key_of(image.encode(), question.encode())

        self.index = index_lines(file, examine, faults)
        self.skipped = tuple(faults.skipped)
        self.content = fingerprint_of(["jsonl", rows_seen.hexdigest()])
        self.fingerprint = fingerprint_of(["jsonl", file.identity, asdict(settings), images_seen.hexdigest()])

    def picture(self, found: dict[str, Any], place: str) -> Picture:
        return self.images.picture(value_of(found, self.columns.image, place), place)


def first_object(file: PinnedFile) -> dict[str, Any]:
    """The first line that holds a JSON object: it says which columns there are.

    Raises DataError where there is none: the file is empty, or what is wrong with its first line.
    """
    fault = DataError(f"{file.path} is empty. A JSON object a line was expected.")
    for count, line in enumerate(line for line in file.lines() if line.content.strip()):
        try:
            return parse_object(line.content, f"{file.path}, line {line.number}")
        except DataError as error:
            fault = error if count == 0 else fault
        if count == 100:
            break
    raise fault
