"""A small model with the names and habits of moondream2's revisions of 2025: made of uninitialised parameters, its
tokenizer fetched while it is made, the suffix of a question given twice, greedy only when asked."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from torch import nn

from .layers import KVCache
from .text import lm_head, text_decoder, text_encoder
from .vision import prepare_crops, vision_encoder, vision_projection

WIDTH, VOCABULARY, LENGTH = 8, 40, 24


class MoondreamModel(nn.Module):
    def __init__(self):
        super().__init__()
        tokens = SimpleNamespace(bos_id=0, eos_id=0, templates={"query": {"prefix": [1, 7], "suffix": [3]}})
        self.config = SimpleNamespace(tokenizer=tokens, vision=None, text=None)
        self.tokenizer = Tokenizer.from_pretrained("moondream/starmie-v1")
        layers = [nn.ModuleDict({"ln1": nn.LayerNorm(6), "fc": nn.Linear(6, 6)}) for _ in range(2)]
        named = {"patch_emb": nn.Linear(12, 6), "post_ln": nn.LayerNorm(6), "proj": nn.Linear(12, WIDTH)}
        self.vision = nn.ModuleDict({**named, "blocks": nn.ModuleList(layers)})
        self.vision.pos_emb = nn.Parameter(torch.full((1, 4, 6), float("nan")))
        layers = [nn.ModuleDict({"ln": nn.LayerNorm(WIDTH), "qkv": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)]
        named = {"post_ln": nn.LayerNorm(WIDTH), "lm_head": nn.Linear(WIDTH, VOCABULARY)}
        self.text = nn.ModuleDict({**named, "blocks": nn.ModuleList(layers)})
        self.text.wte = nn.Parameter(torch.full((VOCABULARY, WIDTH), float("nan")))
        mask = torch.tril(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
        mask[..., :5, :5] = True
        self.register_buffer("attn_mask", mask, persistent=False)

    def _setup_caches(self):
        for block in self.text["blocks"]:
            block.kv_cache = KVCache(LENGTH, WIDTH).to(self.vision.pos_emb.dtype)

    def _run_vision_encoder(self, image):
        crops, _ = prepare_crops(image, self.config.vision, device="cpu")
        found = vision_encoder(crops, self.vision, self.config.vision)
        return vision_projection(found[0], found[1], self.vision, self.config.vision)

    def encode_image(self, image, settings=None):
        if isinstance(image, SimpleNamespace):
            return image
        with torch.inference_mode():
            start = text_encoder(torch.tensor([[0]]), self.text)
            embeds = torch.cat([start, self._run_vision_encoder(image)[None]], dim=1)
            text_decoder(embeds, self.text, self.attn_mask[:, :, :5], torch.arange(5), None)
        return SimpleNamespace(pos=5, caches=[])

    def _prefill_prompt(self, tokens, pos, temperature):
        embeds = text_encoder(tokens, self.text)
        places = torch.arange(pos, pos + embeds.shape[1])
        hidden = text_decoder(embeds, self.text, self.attn_mask[:, :, places], places, None)
        return lm_head(hidden, self.text).argmax(-1, keepdim=True), pos + embeds.shape[1]

    def query(self, image, question, reasoning=True, settings=None):
        image, template = self.encode_image(image, settings), self.config.tokenizer.templates["query"]
        assert settings["variant"] is None and not reasoning
        ids = [*template["prefix"], *self.tokenizer.encode(question).ids, *template["suffix"], *template["suffix"]]
        token, pos = self._prefill_prompt(torch.tensor([ids]), image.pos, settings.get("temperature", 0.5))
        for _ in range(settings["max_tokens"]):
            embeds = text_encoder(token, self.text)
            hidden = text_decoder(embeds, self.text, self.attn_mask[:, :, pos : pos + 1], torch.tensor([pos]), None)
            token, pos = lm_head(hidden, self.text).argmax(-1, keepdim=True), pos + 1
        return {"answer": "text"}


class HfMoondream(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = MoondreamModel()

    def _setup_caches(self):
        self.model._setup_caches()
