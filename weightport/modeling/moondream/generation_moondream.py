"""Generation with moondream2: prefix attention with any cache, the boxes and points of its region head, and thoughts
before an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.masking_utils import create_causal_mask

MAX_OBJECTS = 50
MAX_NEW_TOKENS = 768


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


class AnswerRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """transformers' repetition penalty of what the original's sees: it generates behind embeddings, so that the start
    token and the answer are all its ids, and what stands in the prompt is not penalised.

    Args:
        penalty: above 1 makes ids that were there less likely.
        start_token_id: the id of the start token.
        prompt_length: tokens of the prompt in what this is called with.
    """

    def __init__(self, penalty: float, start_token_id: int, prompt_length: int):
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty)
        self.start_token_id = start_token_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocabulary] of the token that follows `input_ids` [batch, length]."""
        start = input_ids.new_full((input_ids.shape[0], 1), self.start_token_id)
        return self._penalty(torch.cat([start, input_ids[:, self.prompt_length :]], dim=1), scores)


@dataclass(frozen=True)
class MoondreamReasoning:
    """What `reason` gives: ids of the thoughts and of the answer, without what ends them, and the numbers (fractions
    of the picture's width and height in turn) that stand at the thoughts' coordinate tokens."""

    reasoning_ids: list[int]
    coordinates: list[float]
    answer_ids: list[int]


class _Steps:
    """One sequence, piece by piece over one cache. Each call gives (the last state before the last norm
    [1, 1, hidden_size], the logits behind it [1, vocabulary])."""

    def __init__(self, model: Any, states: list[torch.Tensor], inputs: dict[str, Any]):
        self._model, self._states, self._inputs = model, states, inputs
        self._cache = DynamicCache(config=model.config.get_text_config())

    def prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.next(**self._inputs)

    def next(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self._model.model(past_key_values=self._cache, use_cache=True, **arguments)
        logits = self._model.lm_head(outputs.last_hidden_state[:, -1])
        return self._states.pop()[:, -1:], logits


def _picker(
    do_sample: bool | None, temperature: float | None, top_p: float | None
) -> Callable[[torch.Tensor, list[int]], int]:
    """What chooses a token from logits [1, vocabulary], given the ids that it may not be."""
    warpers = LogitsProcessorList()
    if do_sample and temperature is not None:
        warpers.append(TemperatureLogitsWarper(temperature))
    if do_sample and top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))

    def pick(logits: torch.Tensor, forbidden: list[int]) -> int:
        logits = logits.float().clone()
        logits[:, forbidden] = -float("inf")
        if not do_sample:
            return int(logits.argmax(-1))
        no_ids: Any = logits.new_zeros(1, 0).long()
        return int(torch.multinomial(warpers(no_ids, logits).softmax(-1), 1))

    return pick


def _ids(tokens: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([tokens], device=like.device)


class MoondreamGenerationMixin(GenerationMixin):
    """[`GenerationMixin`] with moondream2's prefix attention, and with `detect`, `point` and `reason`."""

    config: Any
    model: Any
    lm_head: Any
    region_head: Any
    states_before_last_norm: Callable[[], AbstractContextManager[list[torch.Tensor]]]

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int | None = None, *args, **kwargs
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)  # type: ignore[misc]
        start = self.config.text_config.bos_token_id
        for place, each in enumerate(processors):
            if isinstance(each, RepetitionPenaltyLogitsProcessor) and start is not None:
                processors[place] = AnswerRepetitionPenaltyLogitsProcessor(
                    each.penalty, start, input_ids_seq_length or 0
                )
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
        head = self._coordinate_head()
        ends = self._end_tokens()
        found: list[tuple[float, ...]] = []
        with self._steps(input_ids, inputs) as steps:
            hidden, logits = steps.prompt()
            while int(logits.argmax(-1)) not in ends and len(found) < max_objects:
                place = []
                for _ in range(2):
                    value = head.decode_coordinate(hidden)
                    place.append(value)
                    embedding = head.encode_coordinate(value[..., None])
                    if len(place) == 1:
                        hidden, _ = steps.next(inputs_embeds=embedding)
                if sizes:
                    hidden, _ = steps.next(inputs_embeds=embedding)
                    size = head.decode_size(hidden)
                    embedding = head.encode_size(size)
                    place += [size[..., 0], size[..., 1]]
                found.append(tuple(float(value) for value in place))
                hidden, logits = steps.next(inputs_embeds=embedding)
        return found

    @torch.no_grad()
    def reason(
        self,
        input_ids: torch.Tensor,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        **inputs: Any,
    ) -> MoondreamReasoning:
        """Thoughts, then an answer (2025-06-21): the prompt is one of `processor.prompt("query", …, reasoning=True)`.

        Thoughts point at places of the picture: at a token of the coordinates' id the number is read from the state
        before it, and given back as what follows. They end at the id of answers, and have neither ends nor sizes.

        Args:
            input_ids: int64 [1, length].
            do_sample, temperature, top_p, max_new_tokens: of thoughts and answer each; by default those of
                `generation_config`.
            inputs: the other inputs of the prompt (`attention_mask`, `pixel_values`, `image_grids`).
        """
        own = self.config.reasoning_config
        if own is None:
            raise ValueError("This revision does not reason: that of 2025-06-21 does.")
        head, settings = self._coordinate_head(), self.generation_config
        chosen: dict[str, Any] = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p}
        pick = _picker(**{
            name: getattr(settings, name) if value is None else value for name, value in chosen.items()
        })  # fmt: skip
        most = max_new_tokens or settings.max_new_tokens or MAX_NEW_TOKENS
        ends, hidden_ids = self._end_tokens(), list(settings.suppress_tokens or [])
        begins = self.config.answer_token_id
        thoughts: list[int] = []
        coordinates: list[float] = []
        answer: list[int] = []
        with self._steps(input_ids, inputs) as steps:
            hidden, logits = steps.prompt()
            token = pick(logits, hidden_ids)
            while token != begins and len(thoughts) < most:
                thoughts.append(token)
                if token == own["coord_token_id"]:
                    value = head.decode_coordinate(hidden)
                    coordinates.append(float(value))
                    hidden, logits = steps.next(inputs_embeds=head.encode_coordinate(value[..., None]))
                else:
                    hidden, logits = steps.next(input_ids=_ids([token], input_ids))
                token = pick(logits, [*hidden_ids, *ends, own["size_token_id"]])
            hidden, logits = steps.next(input_ids=_ids(own["answer_prefix"], input_ids))
            token = pick(logits, hidden_ids)
            while token not in ends and len(answer) < most:
                answer.append(token)
                hidden, logits = steps.next(input_ids=_ids([token], input_ids))
                token = pick(logits, [*hidden_ids, begins])
        return MoondreamReasoning(thoughts, coordinates, answer)

    def _coordinate_head(self) -> Any:
        if (self.config.region_config or {}).get("kind") != "bins":
            raise ValueError("This revision has no head that reads boxes and points: those of 2025 have.")
        return self.region_head

    @contextmanager
    def _steps(self, input_ids: torch.Tensor, inputs: dict[str, Any]) -> Iterator[_Steps]:
        if input_ids.shape[0] != 1:
            raise ValueError(f"Boxes, points and thoughts are read for one prompt at a time, found {len(input_ids)}.")
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with self.states_before_last_norm() as states:
            yield _Steps(self, states, {"input_ids": input_ids, **inputs})

    def _end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        settings: Any = self.generation_config
        ends = settings.eos_token_id if settings.eos_token_id is not None else self.config.text_config.eos_token_id
        return set(ends) if isinstance(ends, (list, tuple)) else {ends}


__all__ = [
    "AnswerRepetitionPenaltyLogitsProcessor",
    "FirstTokenOnlyLogitsProcessor",
    "MoondreamGenerationMixin",
    "MoondreamReasoning",
    "bidirectional_prefix",
]
