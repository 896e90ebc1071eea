"""MUGE's image captions: JSONL {"image_id", "text": [...]} beside a TSV of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightport.errors import DataError
from weightport.finetuning.data.columns import Columns
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.image_folder import find_companion
from weightport.finetuning.data.image_table import IMAGE_ID, ImageTable
from weightport.finetuning.data.record_rows import RecordRows
from weightport.finetuning.data.records import JsonLines
from weightport.finetuning.data.rows import ColumnRows
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.splits import split_named

TEXT = "text"
SUFFIXES = ("", "_imgs", "_images", "_img")
"""What the image table of `train.jsonl` is called: train.tsv, train_imgs.tsv, …"""


def open_muge(path: Path, settings: DataSettings) -> RecordRows:
    """Captions and the table with their images. For training, every pair of an image and a caption is a sample."""
    columns = Columns(settings.image_column or IMAGE_ID, settings.prefix_column, settings.suffix_column or TEXT)
    faults, captions = Faults(settings.skip_bad), PinnedFile(path)
    images = ImageTable(find_image_table(path, settings.images), faults)
    return RecordRows(
        captions, settings, JsonLines(), ColumnRows(columns), images, kind="muge", each_answer=True, faults=faults
    )


def find_image_table(captions: Path, given: Sequence[str] | None) -> Path:
    """The TSV with the images of a caption file.

    It is the file that the settings name; else, in the captions' folder or the folder that the settings name: the TSV
    of the captions' own name (train.tsv, train_imgs.tsv, … for train.jsonl), the only one of the same split
    (MR_train_imgs.tsv for train_texts.jsonl), or the only one at all, unless its name speaks of another split.
    """
    folder = captions.parent
    if given:
        if len(given) > 1:
            raise DataError(f"data.images is {', '.join(given)}: MUGE's captions have one table or folder of images.")
        found = find_companion(given[0], folder)
        if not found.is_dir():
            return found
        folder = found
    tables = sorted(folder.glob("*.tsv"))
    own_names = [captions.stem + suffix for suffix in SUFFIXES]
    split = split_named(captions.stem)
    of_split = [table for table in tables if split is not None and split_named(table.stem) == split]
    of_none = [table for table in tables if split_named(table.stem) is None or split is None]
    for choice in ([table for table in tables if table.stem == own] for own in own_names):
        if choice:
            return choice[0]
    for choice in (of_split, of_none):
        if len(choice) == 1:
            return choice[0]
    raise DataError(
        f"{captions}: no image table for these captions. Looked in {folder} for "
        f"{', '.join(name + '.tsv' for name in own_names)} and for a single *.tsv of the same split; found "
        f"{', '.join(table.name for table in tables) or 'no *.tsv'}. Name it with data.images."
    )
