"""Tellit, as its authors left it: pictures to captions. Needs nothing but torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class ImageBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        hidden = self.up(self.norm2(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))


class Image(nn.Module):
    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(width))
        self.pos = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(ImageBlock(width, heads) for _ in range(layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.pos
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


class TextBlock(nn.Module):
    """Norms come after, and those of all layers are two stacked tensors of the model (see Text)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Text(nn.Module):
    def __init__(self, vocabulary: int, positions: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        # [layers, 2, width]: scale and shift of the norm after attention, and of that after the feed-forward part.
        self.attn_norms = nn.Parameter(torch.zeros(layers, 2, width))
        self.mlp_norms = nn.Parameter(torch.zeros(layers, 2, width))

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        x, before = torch.cat([image, x], 1), image.shape[1]
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        allowed[:before, :before] = True
        for block, after_attn, after_mlp in zip(self.blocks, self.attn_norms, self.mlp_norms):
            x = F.layer_norm(x + block.attn(x, allowed), x.shape[-1:], *after_attn, eps=1e-12)
            x = F.layer_norm(x + block.down(F.gelu(block.up(x))), x.shape[-1:], *after_mlp, eps=1e-12)
        return x


class Tellit(nn.Module):
    """`sizes`: side, patch, image_width, image_layers, image_heads, vocabulary, positions, width, layers, heads."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        s = sizes
        self.image = Image(s["side"], s["patch"], s["image_width"], s["image_layers"], s["image_heads"])
        self.bridge = nn.Linear(s["image_width"], s["width"])
        self.bridge_norm = nn.LayerNorm(s["width"], eps=1e-5)
        self.text = Text(s["vocabulary"], s["positions"], s["width"], s["layers"], s["heads"])
        self.head = nn.Linear(s["width"], s["vocabulary"])

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every value that the port is held against; logits [batch, image + text, vocabulary]."""
        vision = self.image(pixels)
        projected = self.bridge_norm(self.bridge(vision))
        states = self.text(projected, ids)
        logits = self.head(states)
        tokens = logits[:, projected.shape[1] : -1]
        loss = F.cross_entropy(tokens.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        return {"vision": vision, "projector": projected, "decoder": states, "logits": logits, "loss": loss}
