"""Fine-tuning Tellit: a decoder that reads image vectors, the prompt and the answer in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.errors import DataError, RecipeError
from weightport.finetuning.data.samples import Sample
from weightport.finetuning.family import Answer, Images, Parts, Room, filled, shortened
from weightport.finetuning.recipes.settings import BatchSettings

_LINEAR = r"git\.encoder\.layer\.\d+\.attention\.self\.(query|key|value)"


class TellitTraining:
    """The family `tellit`."""

    name = "tellit"
    causal = True
    own_loss = False
    leaves_unused = False
    full_precision = ("output", "git.image_encoder", "git.visual_projection")
    parts = Parts(
        prefixes={
            "vision": ("git.image_encoder",),
            "projector": ("git.visual_projection",),
            "embeddings": ("git.embeddings",),
            "decoder": ("git.encoder",),
            "head": ("output",),
        },
        targets={
            "vision": ("vision",),
            "projector": ("projector",),
            "embeddings": ("embeddings",),
            "decoder": ("decoder",),
            "language": ("embeddings", "decoder", "head"),
        },
        lora={"decoder": _LINEAR},
    )
    cached = ()

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        side = config.vision_config.image_size
        if pixels != side:
            raise RecipeError(f"batch.image_size is {side} for this model, whose positions are learned, not {pixels}.")

    def room(self, processor: Any, config: Any) -> Room:
        positions = config.max_position_embeddings
        return Room(positions - 2, positions - 1, total=positions)

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        return False

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        return shortened(processor.tokenizer, filled(batch.prompt or "", sample), batch.max_prompt_length)

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if sample.objects is not None:
            raise DataError(f"{sample.place}: Tellit writes captions, no boxes.")
        return shortened(processor.tokenizer, sample.suffix, batch.max_target_length - 1)

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        ids = [self._prompt_ids(processor, prompt) for prompt in prompts]
        tensors = _padded(ids, processor.tokenizer.pad_token_id, left=True)
        return {**tensors, "pixel_values": _pixels(processor, images)}

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        tokenizer = processor.tokenizer
        asked = [self._prompt_ids(processor, prompt) for prompt in prompts]
        said = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id] for text in answers]
        tensors = _padded([a + b for a, b in zip(asked, said)], tokenizer.pad_token_id, left=False)
        labels = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
        for row, prompt in enumerate(asked):
            labels[row, : len(prompt)] = -100
        return {**tensors, "labels": labels, "pixel_values": _pixels(processor, images)}

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        return Answer(str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip())

    def _prompt_ids(self, processor: Any, prompt: str) -> list[int]:
        tokenizer = processor.tokenizer
        return [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def _pixels(processor: Any, images: Images) -> torch.Tensor:
    if images is None or any(image is None for image in images):
        raise DataError("Tellit answers about images, and a sample has none.")
    pixels: torch.Tensor = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    return pixels


def _padded(rows: Sequence[list[int]], pad: int, *, left: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [batch, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        place = slice(longest - len(values), None) if left else slice(0, len(values))
        ids[row, place] = torch.tensor(values)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


TRAINING = TellitTraining()
