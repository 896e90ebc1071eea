"""A small model with the module names and habits of moondream2's revisions of 2024: attention in float32, float16
pixels, no gradient through the vision encoder."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

WIDTH, VOCABULARY = 8, 40


class Config:
    @classmethod
    def from_pretrained(cls, folder):
        return cls()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        visual = nn.Module()
        visual.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        visual.patches = nn.Linear(3 * 4, 6)
        visual.forward = lambda x: visual.blocks[1](visual.blocks[0](visual.patches(x)))
        self.model = nn.ModuleDict({"visual": visual})

    def forward(self, x):
        return self.model["visual"](x)


class VisionEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.projection = Encoder(), nn.Linear(6, WIDTH)

    def preprocess(self, image):
        pixels = torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1)
        return pixels.to(torch.float16) / 255 - 0.5

    def forward(self, images):
        with torch.no_grad():
            pixels = self.preprocess(images.convert("RGB"))[None].to(self.projection.weight.dtype)
            patches = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(1, 4, 12)
            return self.projection(self.encoder(patches))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.Wqkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("inv_freq", torch.ones(2))

    def forward(self, x, attention_mask=None):
        q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        scores = q.to(torch.float32) @ k.to(torch.float32).transpose(1, 2)
        scores = scores + torch.triu(torch.full(scores.shape[1:], torch.finfo(scores.dtype).min), 1)
        return (x + nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v,)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer.h = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Module()
        self.lm_head.ln, self.lm_head.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(self, inputs_embeds, attention_mask, position_ids):
        x = inputs_embeds
        for layer in self.transformer.h:
            x = layer(x, attention_mask=attention_mask)[0]
        return SimpleNamespace(logits=self.lm_head.linear(self.lm_head.ln(x)).float())

    def generate(self, inputs_embeds, max_new_tokens, bos_token_id, **settings):
        ids = [bos_token_id, *range(5, 5 + max_new_tokens)]
        return SimpleNamespace(sequences=torch.tensor([ids]), scores=(None,) * max_new_tokens)


class Moondream(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vision_encoder, self.text_model = VisionEncoder(), Text()
