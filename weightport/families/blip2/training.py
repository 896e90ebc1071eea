"""Fine-tuning BLIP-2: what LAVIS gives the language model, whose loss is that of the caption alone.

OPT reads the queries' vectors, `</s>`, prompt, caption and a line end in one sequence; labels are the caption and the
line end, and without a prompt `</s>` too. Flan-T5 reads the queries and the prompt in its encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from weightport.errors import RecipeError
from weightport.families.blip2.layouts import Kind
from weightport.finetuning.batches import image_inputs, padded, padded_with_mask
from weightport.finetuning.data.samples import Sample
from weightport.finetuning.family import Answer, Images, Parts, Room, filled, shifted, shortened
from weightport.finetuning.features.cached_part import CachedPart, Features, Inputs, as_pixels, whole
from weightport.finetuning.recipes.settings import BatchSettings

IGNORED = -100
LINE_END = "\n"
T5_POSITIONS = 512
"""Tokens that Flan-T5 was trained with; its positions are relative."""

PROMPTS: Mapping[str, Callable[[Sample], str]] = {
    "caption": lambda sample: "a photo of",
    "vqa": lambda sample: f"Question: {sample.prefix} Short answer:",
}
"""What LAVIS asks, by task (its caption models and its configurations of question answering)."""


class _ImageOutput(BaseModelOutputWithPooling):
    """What the model's own image features have beside the vectors: nothing here."""

    qformer_outputs: Any = None
    vision_outputs: Any = None


def _tower_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.vision_model(inputs["pixel_values"]).last_hidden_state)


def _image_vectors(model: Any, inputs: Mapping[str, torch.Tensor]) -> Features:
    return whole(model.get_image_features(inputs["pixel_values"]).pooler_output)


def _as_image_output(inputs: Inputs, features: Features) -> Inputs:
    output = _ImageOutput(pooler_output=features.states)
    return {**inputs, "pixel_values": None, "mm_encoder_outputs": {"image": output}}


PARTS = Parts(
    prefixes={
        "norm": ("vision_model.post_layernorm",),
        "vision": ("vision_model",),
        "qformer": ("qformer", "query_tokens"),
        "projector": ("language_projection",),
        "embeddings": (
            "language_model.model.decoder.embed_tokens",
            "language_model.shared",
            "language_model.encoder.embed_tokens",
            "language_model.decoder.embed_tokens",
        ),
        "head": ("language_model.lm_head",),
        "language": ("language_model",),
    },
    targets={
        "vision": ("vision",),
        # What LAVIS trains in every stage.
        "bridge": ("norm", "qformer", "projector"),
        "norm": ("norm",),
        "qformer": ("qformer",),
        "projector": ("projector",),
        "embeddings": ("embeddings",),
        "language": ("embeddings", "head", "language"),
    },
    lora={"language": r"language_model\..+\.(q_proj|v_proj|q|v)"},
)
"""The norm behind the vision encoder is LAVIS's ln_vision, which is trained while the encoder stands still."""


@dataclass(frozen=True)
class Blip2Training:
    """The family `blip2`, with a language model of `kind`."""

    kind: Kind = "opt"

    name = "blip2"
    own_loss = True
    leaves_unused = False
    full_precision = ("lm_head", "vision_model", "qformer", "language_projection")
    parts = PARTS
    cached = (
        CachedPart(
            "image vectors",
            ("norm", "vision", "qformer", "projector"),
            per_prompt=False,
            compute=_image_vectors,
            feed=_as_image_output,
        ),
        CachedPart(
            "vision encoder",
            ("norm", "vision"),
            per_prompt=False,
            compute=_tower_output,
            feed=as_pixels,
            bypassed=("vision_model",),
        ),
    )

    @property
    def causal(self) -> bool:
        return self.kind == "opt"

    @property
    def counts_padding(self) -> bool:
        """A guide's loss over every position can be had of both language models."""
        return True

    @property
    def mean_of_batch(self) -> bool:
        """T5's own loss is the mean of its batch, however many batches and processes make a step."""
        return self.kind == "t5"

    def of(self, config: Mapping[str, Any]) -> Blip2Training:
        """The stage for a model of this config.json. Raises RecipeError for one that is not trained here."""
        if (config.get("qformer_config") or {}).get("use_qformer_text_input"):
            raise RecipeError(
                "A BLIP-2 for image-text retrieval is not trained here: it says nothing. `weightport evaluate "
                "--metric recall` measures it."
            )
        kind = (config.get("text_config") or {}).get("model_type")
        return Blip2Training("t5" if kind == "t5" else "opt")

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        side = config.vision_config.image_size
        if pixels != side:
            raise RecipeError(
                f"batch.image_size is {side} for this model, whose positions are learned, not {pixels}. Convert the "
                f"checkpoint with --image-size {pixels}, which resizes them as LAVIS does."
            )

    def room(self, processor: Any, config: Any) -> Room:
        if self.kind == "t5":
            return Room(T5_POSITIONS - processor.num_query_tokens - 1, T5_POSITIONS)
        total = config.get_text_config().max_position_embeddings + processor.num_query_tokens
        # `</s>` before the text; the queries take positions too.
        text = total - 2 * processor.num_query_tokens - 1
        return Room(text - 1, text, total - processor.num_query_tokens)

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        return False

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if batch.prompt is not None:
            text = filled(batch.prompt, sample)
        elif batch.task in PROMPTS:
            text = PROMPTS[batch.task](sample)
        else:
            raise RecipeError(
                f"BLIP-2 has no task {batch.task!r} here (it has {', '.join(PROMPTS)}): set batch.prompt, such as "
                '"Question: {prefix} Answer:".'
            )
        return shortened(processor.tokenizer, text.strip(), batch.max_prompt_length)

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        if sample.objects is not None:
            raise RecipeError("BLIP-2 has no words for boxes.")
        return shortened(processor.tokenizer, sample.suffix.strip(), batch.max_target_length - 1)

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        rows = [_tokens(processor, prompt) for prompt in prompts]
        return _sequences(processor, rows, left=self.causal) | image_inputs(processor, images, "BLIP-2")

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        if self.kind == "t5":
            return self._encoded_for_t5(processor, batch, prompts, answers) | image_inputs(processor, images, "BLIP-2")
        return self._encoded_for_opt(processor, batch, prompts, answers) | image_inputs(processor, images, "BLIP-2")

    def _encoded_for_opt(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], answers: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Prompt and caption are one text, as LAVIS cuts it into tokens, and cut at max_target_length together."""
        texts = [f"{prompt} {answer}".lstrip() + LINE_END for prompt, answer in zip(prompts, answers)]
        rows = [_tokens(processor, text)[: batch.max_target_length] for text in texts]
        asked = [len(_tokens(processor, prompt)) if prompt else 0 for prompt in prompts]
        tensors = _sequences(processor, rows, left=False)
        if batch.count_padding:
            return {**tensors, "labels": tensors["input_ids"].clone()}
        queries = processor.num_query_tokens
        labels = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, IGNORED)
        labels[:, :queries] = IGNORED
        for row, count in enumerate(asked):
            labels[row, queries : queries + count] = IGNORED
        return {**tensors, "labels": labels}

    def _encoded_for_t5(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], answers: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        end = processor.tokenizer.eos_token_id
        rows = [[*_tokens(processor, answer)[:-1][: batch.max_target_length - 1], end] for answer in answers]
        fill = processor.tokenizer.pad_token_id if batch.count_padding else IGNORED
        tensors = _sequences(processor, [_tokens(processor, prompt) for prompt in prompts], left=False)
        labels = padded(rows, fill, left=False)
        # T5 begins with its pad.
        start = processor.tokenizer.pad_token_id
        return {
            **tensors,
            "labels": labels,
            "decoder_input_ids": shifted(labels, start, start),
            "decoder_attention_mask": padded([[1] * len(row) for row in rows], 0, left=False),
        }

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        return Answer(str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip())


def _tokens(processor: Any, text: str) -> list[int]:
    """With what the tokenizer puts around a text. The image's token spelled out in a text says no image."""
    image = str(processor.image_token)
    return list(map(int, processor.tokenizer(text.replace(image, f"{image[:-1]} {image[-1:]}"))["input_ids"]))


def _sequences(processor: Any, rows: Sequence[Sequence[int]], *, left: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [batch, queries + longest]: places of the image, then the text, padded on
    the `left` or behind."""
    tokenizer = processor.tokenizer
    tensors = padded_with_mask(rows, tokenizer.pad_token_id, left=left)
    image = tokenizer.convert_tokens_to_ids(str(processor.image_token))
    before = {"input_ids": image, "attention_mask": 1}
    return {name: pad(tensors[name], (processor.num_query_tokens, 0), value=before[name]) for name in before}


TRAINING = Blip2Training()
