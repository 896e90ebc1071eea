"""Generation with moondream2: prefix attention with any cache, and the boxes and points of its region head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_causal_mask

MAX_OBJECTS = 50


def bidirectional_prefix(is_image: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which positions see each other: int64 [batch, length], 0 up to the last place of an image, -1 behind it.

    `is_image` is bool [batch, length]. Padding before the start token is in no block; a row without an image has none.
    """
    up_to_image = is_image.flip(1).cumsum(1).flip(1) > 0
    if attention_mask is not None and attention_mask.ndim == 2:
        up_to_image = up_to_image & attention_mask[:, -is_image.shape[1] :].bool()
    return torch.where(up_to_image, 0, -1)


class FirstTokenOnlyLogitsProcessor(LogitsProcessor):
    """Forbids `token_id` everywhere but as the first generated token.

    Args:
        token_id: the id.
        prompt_length: tokens of the prompt in what this is called with.
    """

    def __init__(self, token_id: int, prompt_length: int):
        self.token_id = token_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocabulary] of the token that follows `input_ids` [batch, length]."""
        if input_ids.shape[-1] <= self.prompt_length:
            return scores
        forbidden = torch.arange(scores.shape[-1], device=scores.device) == self.token_id
        return scores.masked_fill(forbidden, -float("inf"))


class MoondreamGenerationMixin(GenerationMixin):
    """[`GenerationMixin`] with moondream2's prefix attention, and with `detect` and `point`."""

    config: Any
    model: Any
    lm_head: Any
    states_before_last_norm: Callable[[], AbstractContextManager[list[torch.Tensor]]]

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int | None = None, *args, **kwargs
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)  # type: ignore[misc]
        if self.config.answer_token_id is not None:
            processors.append(FirstTokenOnlyLogitsProcessor(self.config.answer_token_id, input_ids_seq_length or 0))
        return processors

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, is_first_iteration=False, **kwargs):  # type: ignore[override]
        features = kwargs.pop("image_features", None)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if features is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            inputs["image_features"] = features
        ids, whole = inputs.get("input_ids"), inputs.get("attention_mask")
        if self.config.prefix_bidirectional and ids is not None and getattr(whole, "ndim", 0) == 4:
            # Made for a cache of fixed shape, which knows nothing of images.
            is_image = ids == self.config.image_token_id
            if bool(is_image.any()):
                inputs["attention_mask"] = create_causal_mask(
                    config=self.config.text_config,
                    inputs_embeds=torch.empty((*ids.shape, 0), dtype=whole.dtype, device=ids.device),
                    attention_mask=attention_mask,
                    past_key_values=inputs.get("past_key_values"),
                    position_ids=inputs.get("position_ids"),
                    block_sequence_ids=bidirectional_prefix(is_image, attention_mask),
                )
        return inputs

    @torch.no_grad()
    def detect(
        self, input_ids: torch.Tensor, *, max_objects: int = MAX_OBJECTS, **inputs: Any
    ) -> list[dict[str, float]]:
        """Boxes of what the prompt asks for: `x_min`, `y_min`, `x_max`, `y_max` in fractions of the picture's width
        and height, not clipped to it. Greedy, as the original decides.

        Args:
            input_ids: int64 [1, length], of a prompt for detection.
            max_objects: boxes at most.
            inputs: the other inputs of the prompt (`attention_mask`, `pixel_values`, `image_grids`).
        """
        boxes = []
        for x, y, width, height in self._objects(input_ids, inputs, max_objects, sizes=True):
            boxes.append(
                {
                    "x_min": x - width / 2,
                    "y_min": y - height / 2,
                    "x_max": x + width / 2,
                    "y_max": y + height / 2,
                }
            )
        return boxes

    @torch.no_grad()
    def point(
        self, input_ids: torch.Tensor, *, max_objects: int = MAX_OBJECTS, **inputs: Any
    ) -> list[dict[str, float]]:
        """Centres of what the prompt asks for: `x`, `y` in fractions of the picture's width and height. See
        `detect`."""
        found = self._objects(input_ids, inputs, max_objects, sizes=False)
        return [{"x": x, "y": y} for x, y in found]

    def _objects(
        self, input_ids: torch.Tensor, inputs: dict[str, Any], max_objects: int, *, sizes: bool
    ) -> list[tuple[float, ...]]:
        """(x, y) of every object, with `sizes` (x, y, width, height): each number is read from the state that follows
        the one before, and the head decides after each object whether there is another."""
        head: Any = getattr(self, "region_head", None)
        if (self.config.region_config or {}).get("kind") != "bins":
            raise ValueError("This revision has no head that reads boxes and points: those of 2025 have.")
        if input_ids.shape[0] != 1:
            raise ValueError(f"Boxes and points are read for one prompt at a time, found {input_ids.shape[0]}.")
        inputs.pop("attention_mask", None)
        cache = DynamicCache(config=self.config.get_text_config())
        found: list[tuple[float, ...]] = []
        with self.states_before_last_norm() as states:

            def step(**arguments: Any) -> tuple[torch.Tensor, int]:
                """(the last state [1, 1, hidden_size], the likeliest token) of one call of the model."""
                outputs = self.model(past_key_values=cache, use_cache=True, **arguments)
                logits = self.lm_head(outputs.last_hidden_state[:, -1:])
                return states.pop()[:, -1:], int(logits.argmax(-1))

            hidden, token = step(input_ids=input_ids, **inputs)
            ends = self._end_tokens()
            while token not in ends and len(found) < max_objects:
                place = []
                for _ in range(2):
                    value = head.decode_coordinate(hidden)
                    place.append(value)
                    embedding = head.encode_coordinate(value[..., None])
                    if len(place) == 1:
                        hidden, _ = step(inputs_embeds=embedding)
                if sizes:
                    hidden, _ = step(inputs_embeds=embedding)
                    size = head.decode_size(hidden)
                    embedding = head.encode_size(size)
                    place += [size[..., 0], size[..., 1]]
                found.append(tuple(float(value) for value in place))
                hidden, token = step(inputs_embeds=embedding)
        return found

    def _end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        settings: Any = self.generation_config
        ends = settings.eos_token_id if settings.eos_token_id is not None else self.config.text_config.eos_token_id
        return set(ends) if isinstance(ends, (list, tuple)) else {ends}


__all__ = ["FirstTokenOnlyLogitsProcessor", "MoondreamGenerationMixin", "bidirectional_prefix"]
