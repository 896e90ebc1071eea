"""Fine-tuning PaliGemma 1 and 2: image, prompt and a new line see each other, the answer sees what is before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.errors import DataError, RecipeError
from weightport.finetuning.batches import image_inputs, padded, padded_with_mask
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.family import Answer, Images, Parts, Room, filled, shortened
from weightport.finetuning.features.cached_part import CachedPart, Features, as_pixels, whole
from weightport.finetuning.recipes.settings import BatchSettings

BINS = 1024
"""Places along a side, from <loc0000> on."""

PREFIX, SUFFIX = 0, 1
"""Token types: what sees the whole prompt, and what is generated behind it."""

IGNORED = -100
BETWEEN = " ; "
"""What the original puts between classes that it asks for, and between objects of an answer."""

_LINEAR = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
_OBJECT = re.compile(r"((?:<loc\d{4}>){4})\s*([^<>;]*)")
_PLACE = re.compile(r"<loc(\d{4})>")


def _asked_for(sample: Sample) -> str:
    if not sample.classes:
        raise RecipeError(
            "PaliGemma is asked for the classes that it is to find, and these data name none: read COCO annotations "
            'with data.form=detection, or set batch.prompt, such as "detect {prefix}".'
        )
    return f"detect {BETWEEN.join(sample.classes)}"


PROMPTS: Mapping[str, Callable[[Sample], str]] = {
    "caption": lambda sample: "caption en",
    "ocr": lambda sample: "ocr",
    "vqa": lambda sample: f"answer en {sample.prefix}",
    "detection": _asked_for,
}
"""What the original was pre-trained to be asked, by task."""


def _tower_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.model.vision_tower(inputs["pixel_values"]).last_hidden_state)


def _image_vectors(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.get_image_features(inputs["pixel_values"]).pooler_output)


@dataclass(frozen=True)
class _Row:
    """A sequence: places of the image, beginning, prompt and new line, then the answer with its end."""

    prefix: list[int]
    suffix: list[int]


class PaliGemmaTraining:
    """The family `paligemma2`: PaliGemma 1 and 2."""

    name = "paligemma2"
    causal = True
    own_loss = False
    leaves_unused = False
    full_precision = ("lm_head", "model.vision_tower", "model.multi_modal_projector")
    parts = Parts(
        prefixes={
            "vision": ("model.vision_tower",),
            "projector": ("model.multi_modal_projector",),
            "embeddings": ("model.language_model.embed_tokens",),
            "decoder": ("model.language_model",),
            "head": ("lm_head",),
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
    cached: tuple[CachedPart, ...] = (
        CachedPart(
            "projector",
            ("vision", "projector"),
            per_prompt=False,
            compute=_image_vectors,
            feed=as_pixels,
            bypassed=("model.vision_tower", "model.multi_modal_projector"),
        ),
        CachedPart(
            "vision tower",
            ("vision",),
            per_prompt=False,
            compute=_tower_output,
            feed=as_pixels,
            bypassed=("model.vision_tower",),
            read_by_linear=True,
        ),
    )

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        side = config.vision_config.image_size
        if pixels != side:
            raise RecipeError(
                f"batch.image_size is {side} for this model, whose positions are learned, not {pixels}. There are "
                "checkpoints for 224, 448 and 896 pixels."
            )

    def room(self, processor: Any, config: Any) -> Room:
        total = config.get_text_config().max_position_embeddings
        # <bos> before the prompt, a new line behind it.
        text = total - processor.image_seq_length - 2
        return Room(text - 1, text, total)

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        return False

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if batch.prompt is not None:
            text = filled(batch.prompt, sample)
        elif batch.task in PROMPTS:
            text = PROMPTS[batch.task](sample)
        else:
            raise RecipeError(
                f"PaliGemma has no task {batch.task!r} here (it has {', '.join(PROMPTS)}): set batch.prompt, such as "
                '"answer en {prefix}".'
            )
        return shortened(processor.tokenizer, text, batch.max_prompt_length)

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        room = batch.max_target_length - 1
        if sample.objects is None:
            return shortened(processor.tokenizer, sample.suffix, room)
        text = written_objects(sample.objects)
        tokens = len(_ids(processor, text))
        if tokens > room:
            raise DataError(f"{sample.place}: its boxes are {tokens} tokens, batch.max_target_length is {room + 1}.")
        return text

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        rows = [_Row(_prefix_ids(processor, prompt), []) for prompt in prompts]
        return _sequences(processor, rows, left=True) | image_inputs(processor, images, "PaliGemma")

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        rows = [
            _Row(_prefix_ids(processor, prompt), [*_ids(processor, answer), processor.tokenizer.eos_token_id])
            for prompt, answer in zip(prompts, answers)
        ]
        tensors = _sequences(processor, rows, left=False)
        labels = tensors["input_ids"].masked_fill(tensors["token_type_ids"] != SUFFIX, IGNORED)
        return {**tensors, "labels": labels, **image_inputs(processor, images, "PaliGemma")}

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        text = str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        if batch.task != "detection" or batch.prompt is not None or size is None:
            return Answer(text)
        found = list(read_objects(text, size))
        return Answer(text, Objects(tuple(label for label, _ in found), tuple(box for _, box in found), size))


def written_objects(objects: Objects) -> str:
    """`<loc y0><loc x0><loc y1><loc x1> label ; …`: each place is one of 1024 along its side."""
    width, height = objects.size
    return BETWEEN.join(
        "".join(
            f"<loc{min(max(int(place * BINS / side), 0), BINS - 1):04}>"
            for place, side in ((y0, height), (x0, width), (y1, height), (x1, width))
        )
        + f" {label}"
        for label, (x0, y0, x1, y1) in zip(objects.labels, objects.boxes)
    )


def read_objects(text: str, size: tuple[int, int]) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """The objects in an answer about a picture of `size` (width, height): label and box (x0, y0, x1, y1) in pixels, at
    the middle of each place. What is no object is passed over."""
    width, height = size
    for places, label in _OBJECT.findall(text):
        y0, x0, y1, x1 = ((int(place) + 0.5) / BINS for place in _PLACE.findall(places))
        yield label.strip(), (x0 * width, y0 * height, x1 * width, y1 * height)


def _ids(processor: Any, text: str) -> list[int]:
    """The text's tokens. One that spells out the image's token says no image: it is cut within."""
    image = processor.image_token
    parts = text.replace(image, f"{image[:-1]}\0{image[-1:]}").split("\0") if image in text else [text]
    return [int(each) for part in parts for each in processor.tokenizer(part, add_special_tokens=False)["input_ids"]]


def _prefix_ids(processor: Any, prompt: str) -> list[int]:
    """As the original makes it: prompt and new line are cut into tokens apart."""
    places = [processor.image_token_id] * processor.image_seq_length
    return [*places, processor.tokenizer.bos_token_id, *_ids(processor, prompt), *_ids(processor, "\n")]


def _sequences(processor: Any, rows: Sequence[_Row], *, left: bool) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and token_type_ids, int64 [batch, longest]; padding is masked, and of the prefix's
    type."""
    kinds = [[PREFIX] * len(row.prefix) + [SUFFIX] * len(row.suffix) for row in rows]
    tensors = padded_with_mask([row.prefix + row.suffix for row in rows], processor.tokenizer.pad_token_id, left=left)
    return {**tensors, "token_type_ids": padded(kinds, PREFIX, left=left)}


TRAINING = PaliGemmaTraining()
