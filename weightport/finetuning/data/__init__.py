"""Data sets, read on demand: JSONL with an image folder, MUGE, COCO, and tables through `datasets`."""

from .entries import EntrySamples
from .opening import open_data
from .settings import DataSettings

__all__ = ["DataSettings", "EntrySamples", "open_data"]
