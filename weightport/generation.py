"""Trying a converted model: one image, one prompt, one answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from weightport.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Answer:
    """What a model said: the prompt it was given, its text, and the generated ids."""

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
) -> Answer:
    """Run the model directory on `image` (a file that Pillow reads) and `prompt`, by default the task's own.

    Decoding follows the directory's generation_config.json unless `beams` or `max_new_tokens` say otherwise. Raises
    UsageError when there is nothing to ask about, CheckpointError when the directory has no processor.
    """
    if image is None and prompt is None:
        raise UsageError("Nothing to ask about: give an image, or a --prompt.")
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    directory = Path(directory)
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"{directory} is an adapter: merge it first (port-merge-lora BASE {directory} OUT).")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json.")
    if not (directory / "processor_config.json").is_file():
        raise CheckpointError(
            f"{directory} has no processor (processor_config.json), so text cannot be read or written.\n"
            "  Convert the checkpoint again with --vocab to write one."
        )
    picture = read_image(Path(image)) if image is not None else None
    processor = AutoProcessor.from_pretrained(directory)
    asked = prompt if prompt is not None else task_prompt(processor, task)
    logging.disable_progress_bar()
    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
    model = model.to(device).eval()
    inputs = processor(text=asked, images=picture, return_tensors="pt").to(device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    settings: dict[str, Any] = {}
    if beams is not None:
        settings["num_beams"] = beams
    if max_new_tokens is not None:
        # Two limits at once make transformers warn about the one that loses.
        settings |= {"max_new_tokens": max_new_tokens, "max_length": None}
    with torch.no_grad():
        ids = model.generate(**inputs, **settings)
    return Answer(asked, answer_text(processor, ids[0], asked, picture), ids[0].tolist())


def task_prompt(processor: Any, task: str) -> str:
    """What a processor asks for a task: its own prompt, or the task's token (<OD> for od). Raises UsageError."""
    if hasattr(processor, "prompt"):
        return str(processor.prompt(task))
    token = f"<{task.upper()}>"
    known = getattr(processor, "task_prompts_without_inputs", {})
    if token not in known:
        names = ", ".join(each.strip("<>").lower() for each in known) or "none"
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
    """The picture in RGB. Raises UsageError when the file is missing or no picture."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}.") from error
