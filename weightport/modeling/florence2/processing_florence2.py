"""A processor that behaves as the original's does, wherever transformers' own differs.

    processor = Florence2OriginalProcessor.from_pretrained("out/")

Prompts keep their spaces, `<image>` typed by a user is text, `max_length` leaves room for the image and keeps `</s>`,
padding is attended to, boxes are fractions of pixels, labels are not stripped, and detections can have scores. The
differences are listed in docs/florence2.md. Source: processing_florence2.py of microsoft/Florence-2-large at f0acedb.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import BatchFeature, Florence2Processor, PreTrainedTokenizerFast
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

_QUAD = re.compile(r"(.+?)" + r"<loc_(\d+)>" * 8)
_PHRASE = re.compile(r"[^<]+(?:<loc_\d+>){4,}")
_BOXES = re.compile(r"(?:<loc_\d+>){4,}")
_BOX = re.compile(r"<loc_\d+>" * 4)
_MARKERS = ("<s>", "</s>", "<pad>")


class OriginalPostProcessor(Florence2PostProcessor):
    """Reads answers as the original does: coordinates in fractions of pixels, labels of texts as they stand."""

    def dequantize(self, locations: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Centres of bins [..., 2 or 4] (x, y, …) → float32 pixels of an image of `size` (width, height)."""
        per_bin = torch.tensor([size[0] / self.quantize_bins[0], size[1] / self.quantize_bins[1]])
        return (locations + 0.5) * per_bin.repeat(locations.shape[-1] // 2)

    def parse_ocr_from_text_and_spans(
        self, text: str, pattern: str | None, image_size: tuple[int, int], area_threshold: float = 0.0
    ) -> list[dict[str, Any]]:
        """Texts with their quadrilaterals; `</s>` and spaces stay in the labels."""
        found = []
        for match in (re.compile(pattern) if pattern else _QUAD).finditer(text.replace("<s>", "")):
            label, *bins = match.groups()
            quad = self.dequantize(torch.tensor([int(each) for each in bins]).reshape(-1, 2), image_size)
            found.append({"quad_box": quad.flatten().tolist(), "text": label})
        return found


class Florence2OriginalProcessor(Florence2Processor):
    """Florence2Processor with the original's behaviour. Takes and returns what it does."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        post_processor_config: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            post_processor_config=post_processor_config,
            chat_template=chat_template,
            **kwargs,
        )
        self.post_processor = OriginalPostProcessor(config=post_processor_config, tokenizer=tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Image placeholders and prompts: `input_ids` and `attention_mask` [batch, image + prompt], `pixel_values`.

        `max_length` counts the image's positions; the prompt keeps its end. The mask is one everywhere, padding
        included, because the original attends to it. Raises ValueError without an image, or for a task token that
        stands beside other text.
        """
        if images is None:
            raise ValueError("Florence-2 answers about an image: give `images`.")
        pixels = self.image_processor(images, return_tensors="pt")
        prompts = self._construct_prompts("" if text is None else text)
        encoded = self._plain_tokenizer(
            prompts,
            padding=padding,
            truncation=truncation,
            max_length=None if max_length is None else max_length - self.num_image_tokens,
        )
        image = [self.image_token_id] * self.num_image_tokens
        ids = [image + prompt for prompt in encoded["input_ids"]]
        data = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], **pixels}
        return BatchFeature(data, tensor_type=return_tensors)

    @cached_property
    def _plain_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer without its image token."""
        data = json.loads(self.tokenizer.backend_tokenizer.to_str())
        data["added_tokens"] = [each for each in data["added_tokens"] if each["content"] != self.image_token]
        data["model"]["vocab"].pop(self.image_token, None)
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(data)),
            pad_token=self.tokenizer.pad_token,
            model_max_length=self.tokenizer.model_max_length,
            padding_side="right",
        )

    def _construct_prompts(self, text: str | list[str]) -> list[str]:
        """Task tokens replaced by their prompts; what a user wrote keeps its spaces."""
        return [self._prompt(each) for each in ([text] if isinstance(text, str) else text)]

    def _prompt(self, text: str) -> str:
        for token, prompt in self.task_prompts_without_inputs.items():
            if token in text:
                if text != token:
                    raise ValueError(f"The task token {token} should be the only text; found {text!r}.")
                return str(prompt)
        for token, prompt in self.task_prompts_with_input.items():
            if token in text:
                return str(prompt.format(input=text.replace(token, "")))
        return text

    def post_process_generation(
        self,
        text: str | None = None,
        sequence: Any = None,
        task: str | None = None,
        image_size: tuple[int, int] | None = None,
        transition_beam_score: Any = None,
    ) -> dict[str, Any]:
        """The answer to `task`, from a decoded `text` or from the ids of a `sequence`, whose first is left out.

        `image_size` is (width, height) in pixels. `transition_beam_score`: log-probabilities of the ids after the
        first (`compute_transition_scores`); detections then have `scores`, the mean probability of their locations.
        """
        if task is None:
            raise ValueError("`task` must be given: the token that the answer belongs to, such as <OD>.")
        if sequence is not None:
            ids = [int(each) for each in sequence][1:]
            text, _ = self.post_processor.decode_with_spans(ids)
        if self.tasks_answer_post_processing_type.get(task, "pure_text") == "pure_text":
            return {task: (text or "").replace("<s>", "").replace("</s>", "")}
        answer: dict[str, Any] = super().post_process_generation(text=text, task=task, image_size=image_size)
        if sequence is not None and transition_beam_score is not None and task in _SCORED_TASKS:
            answer[task]["scores"] = self._scores(ids, [float(each) for each in transition_beam_score], task)
        return answer

    def _scores(self, ids: Sequence[int], log_probabilities: Sequence[float], task: str) -> list[float]:
        """One probability a box, in the order in which the answer lists them."""
        tokens = [
            (token, score)
            for token, score in zip(self.tokenizer.convert_ids_to_tokens(ids), log_probabilities)
            if token not in _MARKERS
        ]
        text, starts = "", []
        for token, _ in tokens:
            starts.append(len(text))
            text += token if token.startswith("<loc_") else self.tokenizer.convert_tokens_to_string([token])
        phrases = (_BOXES if task == "<REGION_PROPOSAL>" else _PHRASE).finditer(text)
        scores = []
        for phrase in phrases:
            for box in _BOX.finditer(text, phrase.start(), phrase.end()):
                inside = [score for start, (_, score) in zip(starts, tokens) if box.start() <= start < box.end()]
                scores.append(math.exp(sum(inside) / len(inside)))
        return scores


_SCORED_TASKS = ("<OD>", "<DENSE_REGION_CAPTION>", "<REGION_PROPOSAL>")
