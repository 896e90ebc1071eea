"""The original's computations written down plainly, on its own tensors: what no golden case was dumped of."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, layer_norm, linear

State = dict[str, torch.Tensor]


def _norm(state: State, name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """[heads, length, width] each, `seen` bool [length, length] → [length, heads * width]."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def image_vectors_of_2024(
    state: State, pixels: torch.Tensor, *, heads: int, exact: bool, epsilon: float
) -> torch.Tensor:
    """What stands at a picture's places, [patches, text width], of one view [3, height, width].

    `exact`: the exact GELU in tower and projector, else the one with tanh.
    """
    visual, kind = "vision_encoder.encoder.model.visual", "none" if exact else "tanh"
    patch = int((state[f"{visual}.patch_embed.linear.weight"].shape[1] // 3) ** 0.5)
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    patches = pixels.reshape(3, rows, patch, columns, patch).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    x = _linear(state, f"{visual}.patch_embed.linear", patches) + state[f"{visual}.pos_embed"][0]
    for number in range(sum(name.startswith(f"{visual}.blocks.") and name.endswith("qkv.bias") for name in state)):
        block = f"{visual}.blocks.{number}"
        q, k, v = _linear(state, f"{block}.attn.qkv", _norm(state, f"{block}.norm1", x, epsilon)).chunk(3, -1)
        x = x + _linear(state, f"{block}.attn.proj", _attend(*(_heads(each, heads) for each in (q, k, v)), None))
        inner = _linear(state, f"{block}.mlp.fc1", _norm(state, f"{block}.norm2", x, epsilon))
        x = x + _linear(state, f"{block}.mlp.fc2", gelu(inner, approximate=kind))
    x = _norm(state, f"{visual}.norm", x, epsilon)
    inner = gelu(_linear(state, "vision_encoder.projection.mlp.fc1", x), approximate=kind)
    return _linear(state, "vision_encoder.projection.mlp.fc2", inner)


def _rotated(x: torch.Tensor, width: int = 32) -> torch.Tensor:
    """[heads, length, head width] with the first `width` channels turned by their position; halves, theta 10000."""
    half = width // 2
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(half) / half)
    first, second, rest = x[..., :half], x[..., half:width], x[..., width:]
    turned = [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()]
    return torch.cat([*turned, rest], -1)


def logits_of_2025(state: State, embeds: torch.Tensor, *, heads: int, key_heads: int, prefix: int) -> torch.Tensor:
    """Logits [length, vocabulary] of one sequence of embeddings [length, width], whose first `prefix` positions see
    each other. Names of 2025, without `model.`."""
    length, width = embeds.shape
    head = width // heads
    seen = torch.ones(length, length).tril().bool()
    seen[:prefix, :prefix] = True
    x = embeds
    for number in range(sum(name.startswith("text.blocks.") and name.endswith("attn.qkv.bias") for name in state)):
        block = f"text.blocks.{number}"
        normed = _norm(state, f"{block}.ln", x, 1e-5)
        parts = _linear(state, f"{block}.attn.qkv", normed).split([width, key_heads * head, key_heads * head], -1)
        q, k, v = (_heads(part, count) for part, count in zip(parts, (heads, key_heads, key_heads)))
        k, v = (each.repeat_interleave(heads // key_heads, 0) for each in (_rotated(k), v))
        attended = _linear(state, f"{block}.attn.proj", _attend(_rotated(q), k, v, seen))
        inner = gelu(_linear(state, f"{block}.mlp.fc1", normed), approximate="tanh")
        x = x + attended + _linear(state, f"{block}.mlp.fc2", inner)
    return _linear(state, "text.lm_head", _norm(state, "text.post_ln", x, 1e-5))
