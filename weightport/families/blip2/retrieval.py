"""Retrieval with a stage-1 BLIP-2: texts and pictures as vectors, and how well a pair matches.

Source: salesforce/LAVIS at 506965b9 (blip2_qformer.compute_sim_matrix and compute_itm, processors/blip_processors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize

TEXT_TOKENS = 35
"""Of a text in LAVIS's evaluation of retrieval, with its special tokens."""
WORDS = 50
_SIGNS = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")


def caption(text: str) -> str:
    """A caption as LAVIS cleans it (blip_caption): lower case, some signs are spaces, 50 words at most."""
    cleaned = _SPACES.sub(" ", _SIGNS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    words = cleaned.split(" ")
    return " ".join(words[:WORDS]) if len(words) > WORDS else cleaned


def queries_of(model: Any, count: int) -> torch.Tensor:
    """The queries, for so many pictures: [count, queries, width]."""
    queries: torch.Tensor = model.query_tokens.expand(count, -1, -1)
    return queries


def text_vectors(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unit vectors [texts, width] of ids [texts, length]."""
    states = model.qformer(query_embeds=model.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
    return normalize(model.text_projection(states[:, 0].to(model.text_projection.weight.dtype)), dim=-1)


def image_vectors(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Unit vectors [pictures, queries, width] of the vision encoder's states."""
    seen = model.qformer(query_embeds=queries_of(model, len(states)), encoder_hidden_states=states).last_hidden_state
    return normalize(model.vision_projection(seen.to(model.vision_projection.weight.dtype)), dim=-1)


def joint_states(model: Any, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the Q-Former makes of queries and text together, pair by pair: [pairs, queries + length, width]. `mask` is
    of both, [pairs, queries + length] or with what each position sees."""
    joint: torch.Tensor = model.qformer(
        query_embeds=model.embeddings(ids, query_embeds=queries_of(model, len(ids))),
        query_length=model.config.num_query_tokens,
        attention_mask=mask,
        encoder_hidden_states=states,
    ).last_hidden_state
    return joint


def matching_logits(model: Any, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[pairs, 2] of pictures' states and texts, pair by pair: no match, match."""
    queries = model.config.num_query_tokens
    seen = torch.cat([mask.new_ones(len(mask), queries), mask], dim=1)
    joint = joint_states(model, states, ids, seen)[:, :queries]
    logits: torch.Tensor = model.itm_head(joint.to(model.itm_head.weight.dtype)).mean(1)
    return logits


class Blip2Retrieval:
    """The family `blip2`, where it says how well a picture and a text fit."""

    name = "blip2"
    auto_class = "AutoModelForZeroShotImageClassification"

    def texts(self, processor: Any, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """input_ids and attention_mask, int64 [texts, longest]."""
        encoded = processor.tokenizer(
            list(map(caption, texts)), padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def pictures(self, processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels [pictures, 3, side, side]."""
        pixels: torch.Tensor = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels

    def text_vectors(self, model: Any, texts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Unit vectors [texts, width]."""
        return text_vectors(model, texts["input_ids"], texts["attention_mask"])

    def states(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """What `image_vectors` and `matches` take of pictures: [pictures, …]."""
        states: torch.Tensor = model.vision_model(pixels).last_hidden_state
        return states

    def image_vectors(self, model: Any, states: torch.Tensor) -> torch.Tensor:
        """Unit vectors [pictures, vectors, width]: of a picture's several the nearest one to a text counts."""
        return image_vectors(model, states)

    def matches(self, model: Any, states: torch.Tensor, texts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """How well one picture, states [1, …], matches each text: [texts]."""
        mask = texts["attention_mask"]
        return matching_logits(model, states.expand(len(mask), -1, -1), texts["input_ids"], mask)[:, 1]


def retrieval(config: Mapping[str, Any]) -> Blip2Retrieval | None:
    """The stage for a model of this config.json; None for one that answers in words."""
    return Blip2Retrieval() if (config.get("qformer_config") or {}).get("use_qformer_text_input") else None
