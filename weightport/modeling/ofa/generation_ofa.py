"""Generation with OFA: the original generator's own rules, and what decoding steps take over from the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import EncoderDecoderCache

# <s>, <pad>, </s>, <unk>: a constraint of fairseq's leaves them allowed.
NUM_SPECIAL_TOKENS = 4


class EosAtMaxLengthLogitsProcessor(LogitsProcessor):
    """Lets a sequence that reaches its maximum length end there, with the end token's own score.

    fairseq ends every hypothesis with the end token and counts its real log-probability. `forced_eos_token_id` would
    set that score to 0, which changes the order of beams; nothing at all would leave sequences without an end.

    Args:
        max_length: length of a sequence including the start and the end token.
        eos_token_ids: int64 [number of end tokens].
    """

    def __init__(self, max_length: int, eos_token_ids: torch.Tensor):
        self.max_length = max_length
        self.eos_token_ids = eos_token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocabulary] of the token that follows `input_ids` [batch, length]."""
        if input_ids.shape[-1] < self.max_length - 1:
            return scores
        end_tokens = self.eos_token_ids.to(scores.device)
        # Another processor may have removed the end token (top-k, a trie): something has to be left to choose.
        end_scores = scores[:, end_tokens].clamp(min=torch.finfo(scores.dtype).min)
        return torch.full_like(scores, -float("inf")).index_copy(1, end_tokens, end_scores)


class ConstraintRangeLogitsProcessor(LogitsProcessor):
    """Allows the four special tokens and ids `start <= id < end` only, and gives them all the probability.

    OFA's `constraint_range`: it masks logits before the softmax, so that scores are probabilities among what is
    allowed. (`suppress_tokens` masks after it.)
    """

    def __init__(self, start: int, end: int):
        self.start = start
        self.end = end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [batch, vocabulary] of logits, or of log-probabilities."""
        ids = torch.arange(scores.shape[-1], device=scores.device)
        allowed = (ids < NUM_SPECIAL_TOKENS) | ((ids >= self.start) & (ids < self.end))
        return scores.masked_fill(~allowed, -float("inf")).log_softmax(dim=-1)


class OFAGenerationMixin(GenerationMixin):
    """[`GenerationMixin`] with three settings of its own, which a `GenerationConfig` saves with all the others.

    `ofa_max_length` (default `None`) is the length of a sequence, start and end token included, where neither
    `max_length` nor `max_new_tokens` is given: as a `max_length` of the model's own settings it would make the library
    warn everybody who gives `max_new_tokens`. `ofa_eos_at_max_length` (default `True`) switches
    [`EosAtMaxLengthLogitsProcessor`]; `ofa_constraint_range` (default `None`) is the `[start, end]` of a
    [`ConstraintRangeLogitsProcessor`], such as that of the image codes.
    """

    config: Any
    get_decoder: Callable[[], Any]

    def _set_generation_defaults(self) -> None:
        """What the original's generator always does, for a model without a generation_config.json."""
        settings: Any = self.generation_config
        settings.ofa_eos_at_max_length = True
        settings.ofa_constraint_range = None
        settings.ofa_max_length = None
        if self.config.pad_token_id is not None:
            settings.suppress_tokens = [self.config.pad_token_id]
        # A file of settings that only repeat the model's configuration would be read without those of our own.
        settings._from_model_config = False

    def _prepare_generated_length(self, generation_config, has_default_max_length, input_ids_length, **kwargs):  # type: ignore[override]
        limit = getattr(generation_config, "ofa_max_length", None)
        if limit is not None and has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = limit - input_ids_length
        return super()._prepare_generated_length(  # type: ignore[misc]
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length,
            **kwargs,
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):  # type: ignore[override]
        """As the library's, but a sample's beams share one encoded source: it is not repeated."""
        shared = {key: model_kwargs.pop(key, None) for key in ("encoder_outputs", "pixel_values", "patch_masks")}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, False, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {key: value for key, value in shared.items() if value is not None}

    def _reorder_cache(self, past_key_values: EncoderDecoderCache, beam_idx: torch.Tensor) -> EncoderDecoderCache:
        """Beams go on from others of their own sample, so that keys and values of the source stay where they are."""
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        if (constraint_range := getattr(generation_config, "ofa_constraint_range", None)) is not None:
            # First: what other processors remove later does not make the rest more probable.
            processors.insert(0, ConstraintRangeLogitsProcessor(*constraint_range))
        end_tokens = generation_config._eos_token_tensor
        if getattr(generation_config, "ofa_eos_at_max_length", True) and end_tokens is not None:
            # Last: a processor that normalises scores again would make the only token left certain.
            processors.append(EosAtMaxLengthLogitsProcessor(generation_config.max_length, end_tokens))
        return processors

    def _update_finished_beams(  # type: ignore[override]
        self,
        *,
        topk_log_probs: torch.Tensor,
        is_sent_finished: torch.Tensor,
        next_token_hits_stopping_criteria: torch.Tensor,
        top_num_beam_mask: torch.Tensor,
        num_beams: int,
        early_stopping: bool | str,
        **kwargs,
    ):
        """With `early_stopping`, a finished hypothesis stays, as in fairseq: new ones fill what places are left, best
        first. (The library keeps the best of all, so that a late one may push out an earlier one.)"""
        if early_stopping is True:
            possible = topk_log_probs > torch.finfo(topk_log_probs.dtype).min
            finishing = next_token_hits_stopping_criteria & top_num_beam_mask & possible
            places = num_beams - is_sent_finished.sum(dim=-1, keepdim=True)
            next_token_hits_stopping_criteria = finishing & (finishing.cumsum(dim=-1) <= places)
        return super()._update_finished_beams(
            topk_log_probs=topk_log_probs,
            is_sent_finished=is_sent_finished,
            next_token_hits_stopping_criteria=next_token_hits_stopping_criteria,
            top_num_beam_mask=top_num_beam_mask,
            num_beams=num_beams,
            early_stopping=early_stopping,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids, encoder_outputs=None, **kwargs):  # type: ignore[override]
        if kwargs.get("is_first_iteration") and (input_ids[:, 0] == self.config.pad_token_id).any():
            raise ValueError(
                "decoder_input_ids are padded on the left, but OFA counts target positions from the first column: "
                "generate prompts of different lengths in separate calls."
            )
        if encoder_outputs is not None and encoder_outputs.position_keys is None:
            encoder_outputs.position_keys = self.get_decoder().source_position_keys(
                encoder_outputs.position_embeddings
            )
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, encoder_outputs=encoder_outputs, **kwargs
        )


__all__ = ["ConstraintRangeLogitsProcessor", "EosAtMaxLengthLogitsProcessor", "OFAGenerationMixin"]
