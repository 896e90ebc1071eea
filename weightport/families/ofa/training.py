"""Fine-tuning OFA and OFA-CN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.errors import DataError, RecipeError
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.family import Answer, Images, Parts, Room, filled, shifted, shortened, without_marks
from weightport.finetuning.features.cached_part import CachedPart, Features, Inputs, as_pixels, whole
from weightport.finetuning.recipes.settings import BatchSettings
from weightport.modeling.ofa.processing_ofa import SymbolText
from weightport.modeling.ofa.prompts_ofa import TASKS

PATCH = 16
"""Pixels of an image patch, along a side."""

CHINESE_PROMPTS = {"detection": "图片中有哪些物体?"}
"""Prompts of tasks that the original's code asks in English only."""

SOURCE = ("input_ids", "attention_mask", "pixel_values", "patch_masks")
"""Inputs of the encoder."""

_LINEAR = r"layers\.\d+\.((self|cross)_attn\.(q|k|v|out)_proj|fc1|fc2)"


def _encoder_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    found = model.model.encoder(**{name: inputs[name] for name in SOURCE if name in inputs})
    return Features(found.last_hidden_state, found.attention_mask.sum(dim=1), found.position_embeddings[0])


def _as_encoder_output(inputs: Inputs, features: Features) -> Inputs:
    # The first three fields of OFAEncoderOutput; positions are the same for every sample.
    positions = features.shared[None].expand(len(features.states), -1, -1) if features.shared is not None else None
    return {**inputs, "encoder_outputs": (features.states, features.mask(), positions)}


def _tower_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    tower = model.model.encoder.vision_tower
    return whole(tower(inputs["pixel_values"].to(tower.dtype)).last_hidden_state)


class OFATraining:
    """The family `ofa`. Its encoder holds the image tower."""

    name = "ofa"
    causal = False
    full_precision = ("lm_head", "model.encoder.vision_tower", "model.encoder.image_proj")
    own_loss = True
    text_only = True
    # Its tables of image codes serve other tasks.
    leaves_unused = True
    parts = Parts(
        prefixes={
            "vision": ("model.encoder.vision_tower",),
            "projector": ("model.encoder.image_proj", "model.encoder.patch_layernorm_embedding"),
            "embeddings": ("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
            "encoder": ("model.encoder",),
            "decoder": ("model.decoder",),
            "head": ("lm_head",),
        },
        targets={
            "vision": ("vision",),
            "projector": ("projector",),
            "embeddings": ("embeddings",),
            "encoder": ("vision", "projector", "encoder"),
            "decoder": ("decoder",),
            "language": ("embeddings", "encoder", "decoder", "head"),
        },
        lora={"encoder": rf"model\.encoder\.{_LINEAR}", "decoder": rf"model\.decoder\.{_LINEAR}"},
    )
    cached: tuple[CachedPart, ...] = (
        CachedPart(
            "encoder",
            ("vision", "projector", "embeddings", "encoder"),
            per_prompt=True,
            compute=_encoder_output,
            feed=_as_encoder_output,
            read_by_linear=True,
            projections=r"model\.decoder\.layers\.\d+\.cross_attn\.[kv]_proj",
        ),
        CachedPart(
            "vision tower",
            ("vision",),
            per_prompt=False,
            compute=_tower_output,
            feed=as_pixels,
            bypassed=("model.encoder.vision_tower",),
            read_by_linear=True,
        ),
    )

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        limit = config.image_bucket_size * PATCH
        if pixels % PATCH or not 0 < pixels <= limit:
            raise RecipeError(f"batch.image_size is a multiple of {PATCH} up to {limit} for this model, not {pixels}.")
        processor.image_processor.size = {"height": pixels, "width": pixels}

    def room(self, processor: Any, config: Any) -> Room:
        return Room(config.max_position_embeddings - 2, config.decoder_max_position_embeddings)

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        model.config.label_smoothing = amount
        return True

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if batch.prompt is not None:
            return shortened(processor.tokenizer, filled(batch.prompt, sample), batch.max_prompt_length)
        task = _task(batch)
        if processor.language == "zh" and batch.task in CHINESE_PROMPTS:
            return CHINESE_PROMPTS[batch.task]
        if processor.language not in task.prompts:
            raise RecipeError(
                f"OFA asks {batch.task!r} in {', '.join(task.prompts)} only, and this model speaks "
                f"{processor.language}: set batch.prompt."
            )
        if len(task.fields) > 1:
            raise RecipeError(f"The task {batch.task!r} has {len(task.fields)} fields: write them with batch.prompt.")
        question = shortened(processor.tokenizer, sample.prefix, batch.max_prompt_length)
        return str(processor.prompt(batch.task, **dict.fromkeys(task.fields, question)))

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        room = batch.max_target_length - 1
        if sample.objects is None:
            text = processor.target(batch.task, sample.suffix) if batch.task in TASKS else sample.suffix
            return shortened(processor.tokenizer, text, room)
        text = SymbolText(
            " ".join(
                f"{processor.boxes_to_bins(box, sample.objects.size)} {label}"
                for label, box in zip(sample.objects.labels, sample.objects.boxes)
            )
        )
        tokens = len(processor.symbol_tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens > room:
            raise DataError(f"{sample.place}: its boxes are {tokens} tokens, batch.max_target_length is {room + 1}.")
        return text

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        pictures = list(images) if images and any(image is not None for image in images) else None
        return dict(processor(images=pictures, text=list(prompts), padding=True, return_tensors="pt"))

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        pictures = list(images) if images and any(image is not None for image in images) else None
        tensors = dict(
            processor(
                images=pictures, text=list(prompts), text_target=list(answers), padding=True, return_tensors="pt"
            )
        )
        if batch.count_padding:
            tensors["labels"] = tensors["labels"].masked_fill(tensors["labels"] == -100, config.pad_token_id)
        if "decoder_input_ids" not in tensors:
            start = config.decoder_start_token_id
            tensors["decoder_input_ids"] = shifted(tensors["labels"], start, config.pad_token_id)
        return tensors

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        kind = TASKS[batch.task].answer if batch.task in TASKS else "text"
        if kind != "regions" or size is None:
            return Answer(str(processor.post_process_generation(ids, "caption")["caption"]))
        found = processor.post_process_generation(ids, batch.task, size)[batch.task]
        boxes = tuple(tuple(map(float, box)) for box in found["boxes"])
        text = without_marks(processor.tokenizer, processor.batch_decode(ids[None], skip_special_tokens=False)[0])
        return Answer(text, Objects(tuple(found["labels"]), boxes, size))  # type: ignore[arg-type]


def _task(batch: BatchSettings) -> Any:
    if batch.task not in TASKS:
        raise RecipeError(f"OFA has no task {batch.task!r} (it has {', '.join(TASKS)}): set batch.prompt.")
    return TASKS[batch.task]


TRAINING = OFATraining()
