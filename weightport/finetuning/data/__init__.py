"""Data sets, read on demand: JSONL with an image folder, MUGE, COCO, and tables through `datasets`."""

from weightport.finetuning.data.entries import EntrySamples
from weightport.finetuning.data.opening import local_place, open_data
from weightport.finetuning.data.settings import DataSettings

__all__ = ["DataSettings", "EntrySamples", "local_place", "open_data"]
