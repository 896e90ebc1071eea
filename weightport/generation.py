"""Trying a converted model: one image, one prompt, one answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from weightport.checkpoints import open_checkpoint
from weightport.devices import settle_arithmetic, usable_device
from weightport.errors import CheckpointError, DataError, UsageError
from weightport.model_directory import check_model_directory, check_processor
from weightport.panics import panics_as_errors
from weightport.pictures import BROKEN_PICTURE, picture_formats

LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is fetched, and no code of the directory is run or asked about."""


@dataclass(frozen=True)
class Answer:
    """What a model said: the prompt it was given, its text, and the generated ids without the prompt's."""

    prompt: str
    text: str
    ids: list[int]


def generate(
    directory: str | Path,
    image: str | Path | None = None,
    *,
    prompt: str | None = None,
    task: str = "caption",
    beams: int | None = None,
    max_new_tokens: int | None = None,
    device: str = "cpu",
    tasks: Mapping[str, str] | None = None,
) -> Answer:
    """Run the model directory on `image` (a file that Pillow reads) and `prompt`, by default the task's own.

    Decoding follows the directory's generation_config.json unless `beams` or `max_new_tokens` say otherwise. `tasks`:
    the family's prompts by task, where the processor has none of its own. Raises
    UsageError when there is nothing to ask about, for an unknown task and for a device that cannot be used, DataError
    for what is no picture, CheckpointError for what is no converted directory with a processor.
    """
    if image is None and prompt is None:
        raise UsageError("Nothing to ask about: give an image, or a --prompt.")
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    directory = Path(directory)
    check_model_directory(directory)
    check_processor(directory)
    place = usable_device(device)
    picture = read_image(Path(image)) if image is not None else None
    with _loading(directory):
        processor = AutoProcessor.from_pretrained(directory, **LOCAL)
    asked = prompt if prompt is not None else task_prompt(processor, task, tasks or {})
    logging.disable_progress_bar()
    settle_arithmetic()
    # Our reader says what is wrong with a damaged file, and what to do.
    open_checkpoint(directory)
    with _loading(directory):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype="auto", output_loading_info=True, **LOCAL
        )
    model, found = loaded
    if found["missing_keys"]:
        # transformers would begin with random numbers there.
        raise CheckpointError(
            f"{directory} has no weights for {', '.join(sorted(found['missing_keys'])[:3])} of "
            f"{type(model).__name__}: it is not whole, or is no model that answers."
        )
    model = model.to(place).eval()
    try:
        inputs = processor(text=_placed(asked, picture, processor, model), images=picture, return_tensors="pt")
    except ValueError as error:
        # What processors say of a prompt that does not go with the picture.
        raise UsageError(f"The prompt {asked[:80]!r} cannot be asked: {error}") from error
    inputs = inputs.to(place)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    settings: dict[str, Any] = {}
    if beams is not None:
        settings["num_beams"] = beams
    if max_new_tokens is not None:
        # Two limits at once make transformers warn about the one that loses.
        settings |= {"max_new_tokens": max_new_tokens, "max_length": None}
    with torch.no_grad():
        ids = model.generate(**inputs, **settings)[0]
    if not model.config.is_encoder_decoder:
        # A decoder alone returns the prompt before the answer.
        ids = ids[inputs["input_ids"].shape[1] :]
    return Answer(asked, answer_text(processor, ids, asked, picture), ids.tolist())


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    """What transformers raises for a directory that it cannot load, as CheckpointError."""
    try:
        with panics_as_errors():
            yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{directory} can only be loaded by running code that stands in it, which weightport never does.\n"
                "  `weightport convert` makes a native model of an original checkpoint without running its code."
            ) from error
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error


def _placed(asked: str, picture: Image.Image | None, processor: Any, model: Any) -> str:
    """The prompt with the picture before it, where a decoder reads both in one sequence and its processor puts the
    picture where a token says. A processor that has a form for questions puts the prompt into it."""
    token = getattr(processor, "image_token", None)
    if picture is None or model.config.is_encoder_decoder or not isinstance(token, str) or token in asked:
        return asked
    as_question = getattr(processor, "as_question", None)
    return str(as_question(asked)) if as_question is not None else token + asked


def task_prompt(processor: Any, task: str, tasks: Mapping[str, str]) -> str:
    """What a processor asks for a task, named as `od` or `<OD>`: its own prompt, or the task's token; what the
    family's `tasks` say where it has neither. Raises UsageError for a task that there is no prompt for, or that asks
    for more than a picture."""
    name = task.strip("<>").lower()
    if hasattr(processor, "prompt"):
        try:
            return str(processor.prompt(name))
        except ValueError as error:
            raise UsageError(f"--task {task}: {error}\n  Or give the whole question as --prompt.") from error
    token = f"<{name.upper()}>"
    known = getattr(processor, "task_prompts_without_inputs", {})
    if token in getattr(processor, "task_prompts_with_input", {}):
        raise UsageError(f"--task {task} asks about a text as well: give both as --prompt '{token}the text'.")
    if token not in known:
        if name in tasks:
            return tasks[name]
        names = ", ".join([each.strip("<>").lower() for each in known] + list(tasks)) or "none"
        raise UsageError(f"The model has no prompt for the task {task!r} (it has {names}). Give a --prompt.")
    return token


def answer_text(processor: Any, ids: torch.Tensor, asked: str, picture: Image.Image | None) -> str:
    """The answer in words; where a task token was asked (Florence-2), boxes and labels in pixels, as JSON."""
    kinds = getattr(processor, "tasks_answer_post_processing_type", {})
    task = next((token for token in kinds if token in asked), None)
    if task is None or picture is None:
        return str(processor.batch_decode(ids[None], skip_special_tokens=True)[0]).strip()
    raw = processor.batch_decode(ids[None], skip_special_tokens=False)[0]
    answer = processor.post_process_generation(raw, task=task, image_size=picture.size)[task]
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def read_image(path: Path) -> Image.Image:
    """The picture in RGB. Raises DataError when the file is missing, no picture, broken, or so large that decoding it
    could fill the memory."""
    try:
        with Image.open(path, formats=picture_formats()) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path} is too large a picture to be decoded safely: {error} Make it smaller first."
        ) from error
    except BROKEN_PICTURE as error:
        raise DataError(f"{path} cannot be read as a picture: {error}.") from error
