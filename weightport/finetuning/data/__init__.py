"""Data sets, read on demand: files of records, class folders, tars, COCO and MUGE, and tables through `datasets`."""

from weightport.finetuning.data.entries import EntrySamples
from weightport.finetuning.data.opening import local_places, open_data, open_divided
from weightport.finetuning.data.settings import DataSettings

__all__ = ["DataSettings", "EntrySamples", "local_places", "open_data", "open_divided"]
