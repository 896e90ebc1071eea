"""Fine-tuning moondream2, every revision: start token, picture, question, and the answer behind it.

As the project's notebook of 2024 lays a sample out: the answer begins with a space and ends with the end token,
padding stands on the right, and only the answer is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.errors import DataError, RecipeError
from weightport.finetuning.batches import image_inputs, padded_with_mask
from weightport.finetuning.data.samples import Sample
from weightport.finetuning.family import Answer, Images, Parts, Room, filled, shortened
from weightport.finetuning.features.cached_part import CachedPart, Features, Inputs, whole
from weightport.finetuning.recipes.settings import BatchSettings

IGNORED = -100

_LINEAR = r"model\.language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|dense)|mlp\.(fc1|fc2))"


def _image_vectors(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.get_image_features(inputs["pixel_values"], inputs.get("image_grids")).pooler_output)


def _as_image_features(inputs: Inputs, features: Features) -> Inputs:
    return {**inputs, "image_features": features.states}


class MoondreamTraining:
    """The family `moondream2`."""

    name = "moondream2"
    causal = True
    own_loss = False
    # The region head has no part in an answer in words.
    leaves_unused = True
    full_precision = ("lm_head", "region_head", "model.vision_tower", "model.multi_modal_projector")
    parts = Parts(
        prefixes={
            "vision": ("model.vision_tower",),
            "projector": ("model.multi_modal_projector",),
            "embeddings": ("model.language_model.embed_tokens",),
            "decoder": ("model.language_model",),
            "head": ("lm_head",),
            "region": ("region_head",),
        },
        targets={
            "vision": ("vision",),
            "projector": ("projector",),
            "embeddings": ("embeddings",),
            "decoder": ("decoder",),
            "language": ("embeddings", "decoder", "head"),
            "region": ("region",),
        },
        lora={"decoder": _LINEAR},
    )
    cached: tuple[CachedPart, ...] = (
        CachedPart(
            "projector",
            ("vision", "projector"),
            per_prompt=False,
            compute=_image_vectors,
            feed=_as_image_features,
        ),
    )

    def holds_turns(self, processor: Any) -> bool:
        """Prompts of words hold a chat; those of marks, of 2025, one question."""
        return processor.templates is None

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        side = config.vision_config.image_size
        if pixels != side:
            raise RecipeError(f"batch.image_size is {side} for this model, whose positions are learned, not {pixels}.")

    def room(self, processor: Any, config: Any) -> Room:
        total = config.get_text_config().max_position_embeddings
        # The answer's space and its end may be tokens of their own.
        text = total - len(processor.encode(processor.prompt("query", ""))) - 1
        return Room(text - 1, text, total)

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        return False

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if batch.prompt is not None or batch.task == "vqa":
            question = sample.prefix if batch.prompt is None else filled(batch.prompt, sample)
            question = shortened(processor.tokenizer, question, batch.max_prompt_length)
            return str(processor.prompt("query", question, history=sample.history))
        if batch.task != "caption":
            raise RecipeError(
                f"moondream2 has no task {batch.task!r} here (it has vqa, caption): set batch.prompt, such as "
                '"{prefix}".'
            )
        return str(processor.prompt("caption"))

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if sample.objects is not None:
            raise DataError(
                f"{sample.place}: boxes are no text that moondream2 writes, and its region head is not trained here. "
                "Read COCO annotations with data.form=counting."
            )
        return shortened(processor.tokenizer, sample.suffix, batch.max_target_length - 1)

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        rows = [processor.encode(prompt) for prompt in prompts]
        return padded_with_mask(rows, processor.tokenizer.pad_token_id, left=True) | image_inputs(
            processor, images, "moondream2"
        )

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        asked = [processor.encode(prompt) for prompt in prompts]
        end = processor.tokenizer.eos_token_id
        answered = [[*processor.text_ids(f" {answer}"), end] for answer in answers]
        tensors = padded_with_mask(
            [a + b for a, b in zip(asked, answered)], processor.tokenizer.pad_token_id, left=False
        )
        labels = torch.full_like(tensors["input_ids"], IGNORED)
        for row, (question, answer) in enumerate(zip(asked, answered)):
            labels[row, len(question) : len(question) + len(answer)] = torch.tensor(answer)
        return {**tensors, "labels": labels, **image_inputs(processor, images, "moondream2")}

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        return Answer(processor.answer(ids))


TRAINING = MoondreamTraining()
