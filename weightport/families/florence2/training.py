"""Fine-tuning Florence-2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from weightport.errors import DataError, RecipeError
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.family import Answer, Images, Parts, Room, filled, shifted, shortened, without_marks
from weightport.finetuning.features.cached_part import CachedPart, Features, Inputs, as_pixels, whole
from weightport.finetuning.recipes.settings import BatchSettings

TASK_TOKENS = {
    "caption": "<CAPTION>",
    "detailed_caption": "<DETAILED_CAPTION>",
    "more_detailed_caption": "<MORE_DETAILED_CAPTION>",
    "detection": "<OD>",
    "ocr": "<OCR>",
}
_LINEAR = r"layers\.\d+\.((self_attn|encoder_attn)\.(q|k|v|out)_proj|fc1|fc2)"


def _tower_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.model.vision_tower(inputs["pixel_values"]).last_hidden_state)


def _image_vectors(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.get_image_features(inputs["pixel_values"]).pooler_output)


def _encoder_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    text = model.get_input_embeddings()(inputs["input_ids"])
    vectors = _image_vectors(model, inputs).states.to(text.dtype)
    places = model.get_placeholder_mask(inputs["input_ids"], inputs_embeds=text, image_features=vectors)
    mask = inputs["attention_mask"]
    encoder = model.model.language_model.encoder
    states = encoder(inputs_embeds=text.masked_scatter(places, vectors), attention_mask=mask).last_hidden_state
    return Features(states, mask.sum(dim=1))


def _as_encoder_output(inputs: Inputs, features: Features) -> Inputs:
    mask = features.mask().to(inputs["attention_mask"].dtype)
    return {**inputs, "encoder_outputs": BaseModelOutput(last_hidden_state=features.states), "attention_mask": mask}


def _with_places_for_images(processor: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the processor makes of the prompts of samples with an image, but for the pixels."""
    _, texts, *_ = processor.prepare_inputs_layout(images=[], text=list(prompts))
    places = processor.replace_image_token({}, 0)
    texts = [text.replace(processor.image_token, places, 1) for text in texts]
    # The layout has <s> and </s> in it.
    return dict(processor.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt"))


class Florence2Training:
    """The family `florence2`."""

    name = "florence2"
    causal = False
    full_precision = ("lm_head", "model.vision_tower", "model.multi_modal_projector")
    own_loss = False
    leaves_unused = False
    parts = Parts(
        prefixes={
            "vision": ("model.vision_tower",),
            "projector": ("model.multi_modal_projector",),
            "embeddings": (
                "model.language_model.shared",
                "model.language_model.encoder.embed_tokens",
                "model.language_model.decoder.embed_tokens",
            ),
            "encoder": ("model.language_model.encoder",),
            "decoder": ("model.language_model.decoder",),
            "head": ("lm_head",),
        },
        targets={
            "vision": ("vision",),
            "projector": ("projector",),
            "embeddings": ("embeddings",),
            "encoder": ("encoder",),
            "decoder": ("decoder",),
            "language": ("embeddings", "encoder", "decoder", "head"),
        },
        lora={
            "encoder": rf"model\.language_model\.encoder\.{_LINEAR}",
            "decoder": rf"model\.language_model\.decoder\.{_LINEAR}",
        },
    )
    cached: tuple[CachedPart, ...] = (
        CachedPart(
            "encoder",
            ("vision", "projector", "embeddings", "encoder"),
            per_prompt=True,
            compute=_encoder_output,
            feed=_as_encoder_output,
            read_by_linear=True,
        ),
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
        ),
    )

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        vision = config.vision_config
        stride = math.prod(vision.patch_stride)
        limit = vision.max_position_embeddings * stride
        if pixels % stride or not 0 < pixels <= limit:
            raise RecipeError(
                f"batch.image_size is a multiple of {stride} up to {limit} for this model, not {pixels}."
            )
        images = processor.image_processor
        images.size = {"height": pixels, "width": pixels}
        if getattr(images, "crop_size", None):
            images.crop_size = {"height": pixels, "width": pixels}
        # One vector of the whole image, then one a patch.
        images.image_seq_length = processor.num_image_tokens = (pixels // stride) ** 2 + 1

    def room(self, processor: Any, config: Any) -> Room:
        positions = config.text_config.max_position_embeddings
        return Room(positions - processor.num_image_tokens - 2, positions)

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        return False

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if batch.prompt is not None:
            return shortened(processor.tokenizer, filled(batch.prompt, sample), batch.max_prompt_length)
        if batch.task not in TASK_TOKENS:
            raise RecipeError(
                f"Florence-2 has no task {batch.task!r} here (it has {', '.join(TASK_TOKENS)}): set batch.prompt, "
                'such as "<VQA>{prefix}".'
            )
        return TASK_TOKENS[batch.task]

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        room = batch.max_target_length - 2
        if sample.objects is None:
            return shortened(processor.tokenizer, sample.suffix, room)
        text = self._boxes(processor, sample.objects)
        tokens = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens > room:
            raise DataError(f"{sample.place}: its boxes are {tokens} tokens, batch.max_target_length is {room + 2}.")
        return text

    def _boxes(self, processor: Any, objects: Objects) -> str:
        """`label<loc_x0><loc_y0><loc_x1><loc_y1>` of every object."""
        if not objects.boxes:
            return ""
        bins = processor.post_processor.quantize(torch.tensor(objects.boxes), objects.size).tolist()
        return "".join(
            label + "".join(f"<loc_{place}>" for place in places) for label, places in zip(objects.labels, bins)
        )

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        if images is None:
            tensors = _with_places_for_images(processor, prompts)
        elif any(image is None for image in images):
            raise DataError("Florence-2 answers about images, and a sample has none.")
        else:
            tensors = dict(processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt"))
        if batch.attend_padding:
            tensors["attention_mask"] = torch.ones_like(tensors["attention_mask"])
        return tensors

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        tensors = self.questions(processor, batch, prompts, images)
        text = config.text_config
        encoded = processor.tokenizer(list(answers), padding=True, return_tensors="pt")
        labels = encoded["input_ids"]
        if not batch.count_padding:
            labels = labels.masked_fill(encoded["attention_mask"] == 0, -100)
        tensors["labels"] = labels
        tensors["decoder_input_ids"] = shifted(labels, text.decoder_start_token_id, text.pad_token_id)
        return tensors

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        if batch.task != "detection" or batch.prompt is not None or size is None:
            return Answer(str(processor.batch_decode(ids[None], skip_special_tokens=True)[0]).strip())
        raw = str(processor.batch_decode(ids[None], skip_special_tokens=False)[0])
        # A picture as large as the grid gives the bins themselves; in pixels, transformers cuts boxes to whole ones.
        bins = processor.post_processor.quantize_bins
        found = processor.post_process_generation(raw, task="<OD>", image_size=bins)["<OD>"]
        boxes = tuple(_centres(box, bins, size) for box in found["bboxes"])
        return Answer(without_marks(processor.tokenizer, raw), Objects(tuple(found["labels"]), boxes, size))


def _centres(box: Sequence[int], bins: Sequence[int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box of bin numbers (x0, y0, x1, y1) in pixels of a picture of `size`: the middle of each bin."""
    x0, y0, x1, y1 = ((place + 0.5) * size[i % 2] / bins[i % 2] for i, place in enumerate(box))
    return x0, y0, x1, y1


TRAINING = Florence2Training()
