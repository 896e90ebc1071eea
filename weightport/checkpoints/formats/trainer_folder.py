"""Folders that big_vision's trainers write: a step is a folder with one array a folder, beside it what names the last.

    checkpoint.bv-000001000/params~llm~layers~mlp~linear/.zarray, 0.0.0, …      one step; `/` of a name is `~`
    checkpoint.bv-000002000-tmp/                                               deleted when the next step is written
    checkpoint.bv-LAST                                                         "000001000": the newest finished step

A folder is written under its own name, so that only the text file tells which steps are finished.
"""

from __future__ import annotations

import re
from pathlib import Path

from weightport.checkpoints.formats.zarr_array import METADATA, open_zarr_array
from weightport.checkpoints.naming import tensor_name
from weightport.checkpoints.types import Checkpoint
from weightport.errors import CheckpointError

FORMAT = "zarr-folder"
TEMPORARY = "-tmp"
_STEP = re.compile(r"(?P<base>.+)-(?P<step>\d{1,12})(?P<temporary>-tmp)?")
_TRAINING_STATE = ("opt", "chrono")
_MAX_ARRAYS = 100_000
_LAST = "LAST"


def is_trainer_folder(folder: Path) -> bool:
    """Whether `folder` is a step that a trainer wrote, or holds such steps."""
    return _is_step(folder) or bool(_steps(folder))


def open_trainer_folder(folder: Path) -> Checkpoint:
    """The step in `folder`, or the newest finished one of the steps that it holds.

    Tensors are named as in the trainer's tree (`params/llm/…`). `files` are those of the arrays that are no training
    state; `document` is {"step": the folder's name}. Raises CheckpointError for a step that is temporary or not
    finished, and for arrays that are not complete.
    """
    step = folder if _is_step(folder) else _newest(folder)
    _require_finished(step)
    arrays = {_name(each): open_zarr_array(each) for each in _arrays(step)}
    own = [array for name, array in arrays.items() if name.partition("/")[0] not in _TRAINING_STATE]
    return Checkpoint(
        step,
        FORMAT,
        tuple(file for array in own for file in array.files),
        {name: array.ref(name) for name, array in arrays.items()},
        {"step": step.name},
        {file: state for array in own for file, state in array.states.items()},
    )


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}).") from error


def _is_step(folder: Path) -> bool:
    """Whether `folder` holds arrays: at the first folder in it this shows."""
    first = next((each for each in _children(folder) if each.is_dir()), None)
    return first is not None and (first / METADATA).is_file()


def _steps(folder: Path) -> list[Path]:
    """The steps in `folder`, the newest last."""
    found = [each for each in _children(folder) if _STEP.fullmatch(each.name) and each.is_dir() and _is_step(each)]
    return sorted(found, key=_number)


def _number(step: Path) -> int:
    found = _STEP.fullmatch(step.name)
    return int(found["step"]) if found is not None else -1


def _arrays(step: Path) -> list[Path]:
    found = [each for each in _children(step) if each.is_dir()]
    if len(found) > _MAX_ARRAYS:
        raise CheckpointError(f"{step}: holds {len(found)} folders; no model has so many arrays.")
    if strangers := [each.name for each in found if not (each / METADATA).is_file()]:
        raise CheckpointError(
            f"{step}: {strangers[0]} has no {METADATA}; {len(strangers)} of its {len(found)} folders are no arrays. "
            "The copy is not complete, or the step was never finished."
        )
    return found


def _name(array: Path) -> str:
    return tensor_name(array.name.replace("~", "/"))


def _newest(folder: Path) -> Path:
    """The newest step that is finished and stays. Raises CheckpointError where there is none."""
    steps = _steps(folder)
    kept = [step for step in steps if not step.name.endswith(TEMPORARY) and not _unfinished(step)]
    if kept:
        return kept[-1]
    said = ", ".join(
        f"{step.name} ({'temporary' if step.name.endswith(TEMPORARY) else 'not finished'})" for step in steps
    )
    raise CheckpointError(f"{folder}: holds no step that is finished and stays; there are {said}.")


def _last(step: Path) -> str | None:
    """What the trainer calls its newest finished step; None where it does not say."""
    found = _STEP.fullmatch(step.name)
    path = step.parent / f"{found['base']}-{_LAST}" if found is not None else None
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(64).decode("ascii", "replace").strip()


def _unfinished(step: Path) -> bool:
    """Whether the trainer finished an earlier step as its newest one."""
    newest = re.match(r"\d+", _last(step) or "")
    return newest is not None and _number(step) > int(newest[0])


def _require_finished(step: Path) -> None:
    if step.name.endswith(TEMPORARY):
        finished = (
            f" {_last(step)} is what the trainer names as its newest finished step: give the folder a name without "
            f"{TEMPORARY} to convert it."
            if step.name.endswith(f"-{_last(step)}")
            else ""
        )
        raise CheckpointError(
            f"{step}: is a temporary step, which the trainer deletes when it has written the next one. Name a step "
            f"without {TEMPORARY}.{finished}"
        )
    if _unfinished(step):
        raise CheckpointError(
            f"{step}: is not finished: by the file …-{_LAST} beside it, the newest step that the trainer finished is "
            f"{_last(step)}. Name that one."
        )
