"""generation_config.json: how OFA itself decodes each task.

Sources: fairseq's generator (beam 5, max_len_b 200, a length penalty of 1, one token at least) and the run scripts of
OFA-Sys/OFA (evaluate_caption, evaluate_refcoco, MUGE's). The limit counts the start token and the end, hence + 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Beam:
    """fairseq's generator settings, under its own names."""

    beam: int = 5
    max_len_b: int = 200
    min_len: int = 1
    lenpen: float = 1.0
    no_repeat_ngram_size: int = 0


TASK_BEAMS = {
    ("caption", "en"): Beam(max_len_b=16, no_repeat_ngram_size=3),
    ("caption", "zh"): Beam(beam=8, max_len_b=128, no_repeat_ngram_size=3),
    ("refcoco", "en"): Beam(max_len_b=4, min_len=4, no_repeat_ngram_size=3),
    ("refcoco", "zh"): Beam(max_len_b=4, min_len=4, no_repeat_ngram_size=3),
}


def beam_of(task: Mapping[str, Any], language: str) -> Beam:
    """The settings of a checkpoint's task, with what its own evaluation arguments say on top."""
    known = TASK_BEAMS.get((str(task.get("task")), language), Beam())
    try:
        stated = json.loads(task.get("eval_args") or "{}")
    except (TypeError, ValueError, RecursionError):
        return known
    if not isinstance(stated, Mapping):
        return known
    fields = {name: stated[name] for name in Beam.__dataclass_fields__ if isinstance(stated.get(name), (int, float))}
    return Beam(**{**known.__dict__, **fields})


def constraint_range(task: Mapping[str, Any]) -> list[int] | None:
    """The ids that a task's answers are made of, as in "(58457,59457)"; None when all are allowed."""
    found = re.fullmatch(r"\s*[(\[]?\s*(\d{1,9})\s*,\s*(\d{1,9})\s*[)\]]?\s*", str(task.get("constraint_range") or ""))
    return [int(found[1]), int(found[2])] if found else None


def generation_config(task: Mapping[str, Any], beam: Beam) -> dict[str, Any]:
    """transformers' settings that give the same hypotheses as fairseq's generator."""
    return {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
        "num_beams": beam.beam,
        # Not `max_length`: transformers would warn everybody who passes max_new_tokens.
        "ofa_max_length": beam.max_len_b + 2,
        "min_new_tokens": beam.min_len,
        "length_penalty": float(beam.lenpen),
        "no_repeat_ngram_size": beam.no_repeat_ngram_size,
        "early_stopping": True,
        "do_sample": False,
        # fairseq's generator never picks a pad, and ends a sequence of maximum length with the end token's own score.
        "suppress_tokens": [1],
        "ofa_eos_at_max_length": True,
        "ofa_constraint_range": constraint_range(task),
    }
