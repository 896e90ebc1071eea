"""Stage 1 of BLIP-2's training: contrast, matching and captioning losses of a retrieval model.

Source: salesforce/LAVIS at 506965b9, models/blip2_models/{blip2_qformer,Qformer}.py. Temperature and captioning head
have no place in transformers' Blip2ForImageTextRetrieval; they stand in the side file beside it, and are parameters
here under the original's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from transformers import Blip2ForImageTextRetrieval
from transformers.models.blip_2.modeling_blip_2 import Blip2ImageTextMatchingModelOutput

from weightport.converters.side_file import SIDE_FILE, read_side_file
from weightport.families.blip2.retrieval import image_vectors, joint_states, matching_logits, text_vectors
from weightport.modeling.blip2_lavis.modeling_blip2_lavis import Blip2LavisForImageTextRetrieval

SMOOTHING = 0.1
"""Of contrast and captioning."""
IGNORED = -100


class CaptioningHead(nn.Module):
    """BERT's head of masked words: scores of all words from states [..., width]. Its matrix is the word embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = nn.Module()
        self.decoder.register_parameter("bias", self.bias)

    def forward(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """[..., vocabulary] of states [..., width]; `words` [vocabulary, width]."""
        states = self.transform["LayerNorm"](gelu(self.transform["dense"](states)))
        return nn.functional.linear(states, words, self.bias)


@dataclass
class StageOneOutput(Blip2ImageTextMatchingModelOutput):
    """With the three losses whose sum is `loss`."""

    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None


class StageOneLosses:
    """A retrieval model with what the side file holds, and the losses of LAVIS's stage 1."""

    _keys_to_ignore_on_load_missing = [r"temp$", r"Qformer\."]
    _lacking: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.Qformer = nn.ModuleDict({"cls": nn.ModuleDict({"predictions": CaptioningHead(config.qformer_config)})})

    def load_side_file(self: Any, directory: Path) -> None:
        """Take temperature and captioning head from the directory's side file, in the model's dtype. Losses are
        refused while one of them is not there."""
        own = {name for name in self.state_dict() if name == "temp" or name.startswith("Qformer.")}
        found = {name: ref.read() for name, ref in read_side_file(directory).items() if name in own}
        self.load_state_dict(found, strict=False)
        self._lacking = tuple(sorted(own - found.keys()))

    def forward(
        self: Any,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
        **options: Any,
    ) -> Any:
        """As the retrieval model's own; with `return_loss` the losses of the pairs (picture i, text i), of two pairs
        or more. `input_ids` [pairs, queries + length] begin with the places of the image."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if return_loss and self._lacking:
            raise ValueError(
                f"it computes no loss: {self._lacking[0]} and what else stage 1 is trained with, in {SIDE_FILE}, is "
                "not beside the model"
            )
        if not return_loss:
            return super().forward(pixel_values, input_ids, attention_mask, **options)  # type: ignore[misc]
        queries = self.config.num_query_tokens
        ids, mask = input_ids[:, queries:], attention_mask[:, queries:]
        states = self.vision_model(pixel_values).last_hidden_state
        image_embeds, text_embeds = image_vectors(self, states), text_vectors(self, ids, mask)
        # LAVIS gathers the other side from all processes, without its gradient.
        to_texts = self._similarity(image_embeds, text_embeds.detach())
        to_pictures = self._similarity(image_embeds.detach(), text_embeds).t()
        contrast = _contrast(to_texts) / 2 + _contrast(to_pictures) / 2
        matching = self._matching(states, ids, mask, to_texts.detach())
        captioning = self._captioning(states, ids, mask)
        return StageOneOutput(
            loss=contrast + matching + captioning,
            loss_itc=contrast,
            loss_itm=matching,
            loss_lm=captioning,
            logits_per_image=to_texts,
            logits_per_text=to_pictures,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )

    def _similarity(self: Any, pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """[picture, text] of pictures [picture, query, width] and texts [text, width]: of a picture's queries the one
        that is nearest to the text."""
        similarity: torch.Tensor = (pictures @ texts.t()).amax(1) / self.temp
        return similarity

    def _matching(
        self: Any, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, similarity: torch.Tensor
    ) -> torch.Tensor:
        """Pairs that belong together, texts with another picture, pictures with another text. The other one is drawn
        by similarity: with two pairs there is but one."""
        pairs = len(ids)
        other_picture = torch.multinomial(_others(similarity.t()), 1)[:, 0]
        other_text = torch.multinomial(_others(similarity), 1)[:, 0]
        states = torch.cat([states, states[other_picture], states])
        ids, mask = (torch.cat([each, each, each[other_text]]) for each in (ids, mask))
        labels = torch.cat([ids.new_ones(pairs), ids.new_zeros(2 * pairs)])
        return cross_entropy(matching_logits(self, states, ids, mask), labels)

    def _captioning(self: Any, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The text, word by word, from the queries and the words before: it begins with [DEC] instead of [CLS]."""
        queries, words = self.config.num_query_tokens, self.embeddings.word_embeddings
        labels = ids.clone()
        labels[:, 0] = self.config.get_text_config().bos_token_id
        joint = joint_states(self, states, labels, _captions_mask(mask, queries, states.dtype))
        labels = labels.masked_fill(labels == words.padding_idx, IGNORED)
        scores = self.Qformer["cls"]["predictions"](joint[:, queries:-1], words.weight)
        return cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=SMOOTHING)


class Blip2StageOne(StageOneLosses, Blip2ForImageTextRetrieval):  # type: ignore[misc]
    """Of transformers' own class."""


class Blip2LavisStageOne(StageOneLosses, Blip2LavisForImageTextRetrieval):  # type: ignore[misc]
    """Of ours: with ViT-L, or with LAVIS's epsilon."""


def _contrast(similarity: torch.Tensor) -> torch.Tensor:
    """How little row i is nearest to column i."""
    own = torch.arange(len(similarity), device=similarity.device)
    return cross_entropy(similarity, own, label_smoothing=SMOOTHING)


def _others(similarity: torch.Tensor) -> torch.Tensor:
    """How likely each other one is drawn, by row; none is its own other."""
    likely = similarity.softmax(1) + 1e-4
    return likely.fill_diagonal_(0)


def _captions_mask(mask: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """What each position sees [pairs, 1, queries + length, queries + length]: queries each other and no word, a word
    the queries and the words up to itself that are no padding. 0 for what is seen."""
    pairs, length = mask.shape
    whole = queries + length
    seen = torch.ones(whole, whole, dtype=torch.bool, device=mask.device).tril()
    seen[:queries, :queries] = True
    columns = torch.cat([mask.new_ones(pairs, queries), mask], dim=1).bool()
    shown = seen[None] & columns[:, None]
    hidden = torch.zeros(pairs, whole, whole, dtype=dtype, device=mask.device)
    return hidden.masked_fill(~shown, torch.finfo(dtype).min)[:, None]
