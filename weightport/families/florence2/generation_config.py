"""generation_config.json: what the original's `generate` really uses.

Its outer `generate` calls the inner language model, whose settings transformers 4 made from text_config: the released
values are 3 beams, no repeated 3-gram, early stopping, forced first and last tokens, and a max_length of 20. The
generation_config.json of the released repositories is never read.

The limit is written as `max_new_tokens`, one less than `max_length`, which counts the start token: transformers warns
everybody who passes the one when a directory states the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# transformers 4.41's defaults, which stand for what text_config leaves out.
_DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "do_sample": False,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
START_TOKENS = 1
_ALWAYS = (
    "bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "num_beams", "no_repeat_ngram_size", "early_stopping", "max_length", "do_sample",
)  # fmt: skip


def generation_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that follow from the original's text_config: those of every release, and what a fork changed."""
    settings = {name: text.get(name, default) for name, default in _DEFAULTS.items()}
    kept = {name: settings[name] for name in _ALWAYS}
    kept |= {name: value for name, value in settings.items() if value != _DEFAULTS[name]}
    kept["max_new_tokens"] = kept.pop("max_length") - START_TOKENS
    return {name: value for name, value in kept.items() if value is not None}
