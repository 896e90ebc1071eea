"""Generation runs: transformers' `generate` with the original's settings, and its hypotheses in the original's
form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from weightport.parity.family import Generation, Tensors
from weightport.parity.reference import Expected
from weightport.parity.seams import Missed, Observations, Observed

SEQUENCES, SCORES, POSITIONAL_SCORES = "sequences", "scores", "positional_scores"


def run_generation(
    model: Any,
    generation: Generation,
    arguments: Mapping[str, Any],
    wanted: Sequence[Expected],
    use_cache: bool,
) -> Observations:
    """Generate and return what the wanted seams hold: hypotheses best first, without prompt, and their scores."""
    config = _settings(model.generation_config, generation, use_cache)
    with torch.no_grad():
        output = model.generate(
            **arguments,
            generation_config=config,
            logits_processor=LogitsProcessorList(generation.processors),
        )
    values = _generated(model, generation, config, output)
    observations: Observations = {}
    for each in wanted:
        if each.seam not in values:
            observations[each.tensor.name] = Missed("generate gives no such value")
        elif each.seam == "sequences":
            observations[each.tensor.name] = Observed(
                values["sequences"], _step_shortfall(config, values, output, each)
            )
        else:
            observations[each.tensor.name] = Observed(values[each.seam])
    return observations


def _settings(own: GenerationConfig, generation: Generation, use_cache: bool) -> GenerationConfig:
    """The directory's own generation settings, with those of the run on top."""
    config = copy.deepcopy(own)
    settings = {
        **generation.settings,
        "num_beams": generation.beams,
        "length_penalty": generation.length_penalty,
        "use_cache": use_cache,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    for name, value in settings.items():
        if value is not None:
            setattr(config, name, value)
    config.num_return_sequences = generation.returned or config.num_beams or 1
    return config


def _generated(model: Any, generation: Generation, config: GenerationConfig, output: Any) -> Tensors:
    """Hypotheses [batch, returned, length], their scores [batch, returned], log-probabilities of their tokens.

    `generate` returns log-probabilities for a beam search, and logits for a greedy one.
    """
    searched = (config.num_beams or 1) > 1
    per_token = output.scores if searched else tuple(map(generation.log_probabilities, output.logits))
    tokens = model.compute_transition_scores(output.sequences, per_token, output.get("beam_indices"))
    sequences = output.sequences[:, generation.prompt_length :]
    ended = _after_end(sequences, config)
    length = min(tokens.shape[1], sequences.shape[1])
    tokens = tokens[:, -length:].masked_fill(ended[:, -length:], 0.0)
    lengths = (~ended).sum(-1).clamp(min=1)
    penalty = 1.0 if config.length_penalty is None else config.length_penalty
    scores = output.sequences_scores if searched else tokens.sum(-1) / lengths**penalty
    if config.pad_token_id is not None:
        # transformers takes a pad of 0 for none, and fills up with the end instead.
        sequences = sequences.masked_fill(ended, config.pad_token_id)
    beams = (-1, config.num_return_sequences)
    return {
        "sequences": sequences.unflatten(0, beams),
        "scores": scores.unflatten(0, beams),
        "positional_scores": tokens.unflatten(0, beams),
    }


def _after_end(sequences: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Where a hypothesis is over: every position after its first end token."""
    ends = torch.tensor(config.eos_token_id, device=sequences.device).reshape(-1)
    is_end = torch.isin(sequences, ends).long()
    return (is_end.cumsum(-1) - is_end) > 0


def _step_shortfall(config: GenerationConfig, values: Tensors, output: Any, expected: Expected) -> torch.Tensor | None:
    """How far below the greedy choice the reference's token lies where the two first differ, [batch, 1]; 0 where
    equal."""
    reference, own = expected.tensor.read().to(output.sequences.device), values["sequences"]
    if (config.num_beams or 1) > 1 or reference.ndim != 3 or reference.shape[:2] != own.shape[:2]:
        return None
    shortfall = torch.zeros(own.shape[:2], dtype=torch.float64)
    for sample in range(own.shape[0]):
        length = min(reference.shape[2], own.shape[2], len(output.scores))
        differs = (reference[sample, 0, :length] != own[sample, 0, :length]).nonzero()
        if len(differs):
            step = int(differs[0])
            scores = output.scores[step][sample]
            shortfall[sample, 0] = float(scores.max() - scores[int(reference[sample, 0, step])])
    return shortfall


class Forced(LogitsProcessor):
    """At the first steps only the prefix's token may follow, with its own log-probability (a pad in the prefix: any
    may).

    `prefix`: int64 [batch, length]. `start`: tokens before the prefix.
    """

    def __init__(self, prefix: torch.Tensor, pad: int, start: int = 1) -> None:
        self.prefix, self.pad, self.start = prefix, pad, start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.start
        if step >= self.prefix.shape[1]:
            return scores
        token = self.prefix[:, step].repeat_interleave(scores.shape[0] // self.prefix.shape[0]).unsqueeze(-1)
        forced = torch.full_like(scores, -torch.inf).scatter(1, token, scores.gather(1, token))
        return cast("torch.FloatTensor", torch.where(token == self.pad, scores, forced))


class AfterSoftmax(LogitsProcessor):
    """What another processor forbids, without what it does to the scores of the rest."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forbidden = self.processor(input_ids, scores).isneginf()
        return cast("torch.FloatTensor", scores.masked_fill(forbidden, -torch.inf))
