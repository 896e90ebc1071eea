"""What a 4-bit base was in training: weights quantised to NormalFloat4 and back, as bitsandbytes does it.

An adapter of QLoRA (arXiv:2305.14314) was trained beside these values. The 16 levels are those of the paper's appendix
E (quantiles of a normal distribution, normalised to [-1, 1]) as bitsandbytes prints them in float32; weights are
scaled by the largest magnitude of every 64 consecutive elements. With double quantisation, these scales, less their
mean, are in turn kept in 8 bits: the nearest of 256 dynamic levels (arXiv:1511.04561) times the largest magnitude of
every 256.
"""

from __future__ import annotations

import re

import torch

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

BLOCK = 64
"""Elements that share a scale."""
SCALES_BLOCK = 256
"""Scales that share a scale, with double quantisation."""
KINDS = ("nf4", "nf4-double")

# Whole blocks of at most this many elements are worked on at a time.
_CHUNK = 1 << 22

_NOT_LINEAR = re.compile(
    r"(^|.*[._])(\w*embed\w*|\w*tables\.\d+|shared|wte|wpe|relative_attention_bias|\w*norm\w*|ln_\w+|\w*router\w*|gate)\.weight"
)
_HEAD = re.compile(r"(^|.*\.)(lm_head|embed_out|output_projection|score|classifier|cls\.predictions\.decoder)\.weight")


def is_quantized_layer(name: str, shape: tuple[int, ...], layers: frozenset[str] | None = None) -> bool:
    """Whether a training held this tensor in 4 bits: one of `layers` where these are known, else what bitsandbytes
    takes by default, the weight of a linear layer that is not the head."""
    if layers is not None:
        return name.removesuffix(".weight") in layers and name.endswith(".weight")
    return (
        len(shape) == 2 and name.endswith(".weight") and not _NOT_LINEAR.fullmatch(name) and not _HEAD.fullmatch(name)
    )


def nf4_round_trip(weight: torch.Tensor, *, double: bool = False, flipped: bool = False) -> torch.Tensor:
    """`weight` quantised to NF4 and back, in its own shape and dtype.

    Blocks run along the rows of [out, in]; `flipped` weights are [in, out] (GPT-2's Conv1D).
    """
    oriented = weight.T.contiguous() if flipped else weight
    flat = oriented.reshape(-1)
    out = torch.empty_like(flat)
    scales = _scales(flat)
    if double:
        scales = _double_round_trip(scales)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    boundaries = (levels[1:] + levels[:-1]) / 2
    original = _scales(flat) if double else scales
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.float32)
        first = start // BLOCK
        count = -(-part.numel() // BLOCK)
        used = original[first : first + count].repeat_interleave(BLOCK)[: part.numel()]
        index = torch.bucketize(part * (1.0 / used).nan_to_num(posinf=0.0), boundaries)
        kept = scales[first : first + count].repeat_interleave(BLOCK)[: part.numel()]
        out[start : start + _CHUNK] = (levels[index] * kept).to(weight.dtype)
    result = out.view(oriented.shape)
    return result.T.contiguous() if flipped else result


def _scales(flat: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of every block: float32."""
    parts = []
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.float32).abs()
        short = -part.numel() % BLOCK
        parts.append(torch.nn.functional.pad(part, (0, short)).view(-1, BLOCK).amax(1))
    return torch.cat(parts) if parts else torch.empty(0)


def _double_round_trip(scales: torch.Tensor) -> torch.Tensor:
    offset = scales.mean()
    centred = scales - offset
    blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    outer = blocks.abs().amax(1, keepdim=True)
    levels = dynamic_levels()
    boundaries = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(blocks * (1.0 / outer).nan_to_num(posinf=0.0), boundaries)
    return (levels[index] * outer).view(-1)[: scales.numel()] + offset


def dynamic_levels() -> torch.Tensor:
    """The 256 levels of bitsandbytes' signed dynamic 8-bit type, ascending: float32.

    For each of seven decades below 1, 2^i means of evenly spaced boundaries in [0.1, 1], both signs; then 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
