"""Where a table is: a saved folder, parquet files, or the Hub. No script of a data set is ever run."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.errors import DataError, UsageError
from weightport.extras import install_command
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.data.splits import is_of_split, named_splits, names_split, no_split, split_named
from weightport.hub import HUB_ERRORS, at_once, reason

if TYPE_CHECKING:
    from datasets import Dataset


def open_table(path: str, settings: DataSettings) -> Dataset:
    """The table at a folder, file, pattern of files, or Hub id. Raises DataError when it cannot be read."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f'Tables need the package "datasets". Install it: {install_command("finetune")}') from error
    folder = Path(os.path.expanduser(path))
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _load_saved(folder, settings)
        if files := find_parquet(path, settings):
            with _without_bars():
                return datasets.load_dataset(
                    "parquet", data_files=[glob.escape(file) for file in check_parquet(files)], split="train"
                )
        if folder.exists():
            raise DataError(f"{path}: no table here. Looked for *.parquet and for a folder of datasets' save_to_disk.")
        return _load_from_hub(path, settings)
    except (*HUB_ERRORS, KeyError, datasets.exceptions.DatasetsError) as error:
        raise _explained(path, error) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of `datasets`, which would stand in the output of --json and --quiet; what is here is read at once."""
    from datasets import utils

    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def find_parquet(path: str, settings: DataSettings) -> list[str]:
    """The parquet files that a path means: the file, the files of a pattern, or those of a folder or its data/.

    Where a folder's files speak of several splits, those of the settings' split.
    """
    folder = Path(os.path.expanduser(path))
    given = folder.is_file() or (glob.has_magic(path) and not folder.is_dir())
    if folder.is_file():
        found = [str(folder)]
    elif given:
        found = sorted(name for name in glob.glob(os.path.expanduser(path), recursive=True) if os.path.isfile(name))
        if not found:
            raise DataError(f"{path}: no file fits this pattern.")
    else:
        found = sorted(str(file) for place in (folder, folder / "data") for file in place.glob("*.parquet"))
    splits = sorted({split for file in found if (split := split_named(Path(file).stem)) is not None})
    if settings.split is None:
        # A file or a pattern says itself what is meant.
        if len(splits) > 1 and not given:
            raise DataError(f"{path} has the splits {', '.join(splits)}. Choose one with data.split.")
        return found
    # data/ stands for the folder that it is in.
    own = names_split(folder.absolute().name, settings.split) and not splits
    chosen = [file for file in found if own or is_of_split(Path(file), settings.split)]
    if found and not chosen:
        raise no_split(path, settings.split, splits or named_splits(map(Path, found)))
    return chosen


def check_parquet(files: Sequence[str]) -> list[str]:
    """The files that have rows. Raises DataError for one that is no parquet or has other columns than the first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first: list[str] = []
    filled = []
    for file in files:
        try:
            found = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as parquet: {error}") from error
        names = found.schema.to_arrow_schema().names
        if first and names != first:
            raise DataError(f"{file} has the columns {', '.join(names)}; {files[0]} has {', '.join(first)}.")
        first = first or names
        filled += [file] if found.num_rows else []
    if not filled:
        raise DataError(f"{', '.join(files[:5])} has no samples.")
    return filled


def _load_saved(folder: Path, settings: DataSettings) -> Dataset:
    import datasets

    index = folder / "dataset_dict.json"
    if index.is_file():
        splits = [str(split) for split in json.loads(index.read_text("utf-8"))["splits"]]
        folder = folder / _plain(_choose(splits, settings.split, str(folder)), index)
    state = folder / "state.json"
    content = json.loads(state.read_text("utf-8"))
    for file in content["_data_files"]:
        _plain(file["filename"], state)
    if settings.split is not None and not index.is_file():
        own = content.get("_split")
        if not names_split(str(own or folder.absolute().name), settings.split):
            raise no_split(folder, settings.split, [str(own)] if own else [])
    found: Any = datasets.load_from_disk(str(folder))
    return found.with_format(None)


def _plain(name: Any, where: Path) -> str:
    """A name of a file or folder beside `where`, which a data set may not lead away from."""
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
        raise DataError(f"{where} names {name!r}, which is no file beside it.")
    return name


def _load_from_hub(name: str, settings: DataSettings) -> Dataset:
    import datasets

    options = {"revision": settings.revision}
    split = settings.split
    with at_once():
        if split is not None:
            try:
                return datasets.load_dataset(name, settings.subset, split=split, **options)
            except ValueError as error:
                if not str(error).startswith('Unknown split "'):
                    raise
        # No split, or one that the Hub knows by another name: valid for validation.
        split = _choose(datasets.get_dataset_split_names(name, settings.subset, **options), split, name)
        return datasets.load_dataset(name, settings.subset, split=split, **options)


def _choose(splits: Sequence[str], wanted: str | None, place: str) -> str:
    """The split that is wanted or, without a wish, the only one."""
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted is None:
        raise DataError(f"{place} has the splits {', '.join(splits)}. Choose one with data.split.")
    found = wanted if wanted in splits else next((split for split in splits if names_split(split, wanted)), None)
    if found is None:
        raise no_split(place, wanted, splits)
    return found


def _explained(path: str, error: Exception) -> DataError:
    if isinstance(error, ConnectionError) or "offline" in type(error).__name__.lower():
        return DataError(
            f"{path} is no file or folder here, and as a data set of the Hub it cannot be reached: {reason(error)}. "
            "Check the path, or the name and the network."
        )
    if place := _cache_behind(error):
        return DataError(
            f"{path}: the package `datasets` keeps tables in {place}, which cannot be written there ({error}). Name "
            "another folder in the environment variable HF_DATASETS_CACHE."
        )
    return DataError(f"{path} cannot be read as a table: {error.__cause__ or error}")


def _cache_behind(error: Exception) -> str | None:
    """The folder of `datasets` for its own files, where the error is of it or of a folder that it lies in."""
    from datasets import config

    named = getattr(error, "filename", None)
    place = os.path.abspath(config.HF_DATASETS_CACHE)
    if not isinstance(named, str):
        return None
    return place if os.path.commonpath((place, os.path.abspath(named))) in (place, os.path.abspath(named)) else None
