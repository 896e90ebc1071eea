"""PaliGemma checkpoints of released sizes with made-up values, for benchmarks: written in blocks, or sparse."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from weightport.families.paligemma2.variants import TextShape, variant_named
from weightport.writing.npz import write_npz
from weightport.writing.outgoing import Outgoing

ROWS, PATCH, POSITIONS = 257152, 14, 256
VISION = {"width": 1152, "layers": 27, "heads": 16, "mlp": 4304}
_BLOCK = 8 << 20
Shapes = dict[str, tuple[int, ...]]


def shapes(size: str, layers: int | None = None) -> Shapes:
    """The arrays of a released PaliGemma 2 at 224 px by name; `layers` of its text layers where not all."""
    text = variant_named(size).shape
    text = replace(text, layers=layers or text.layers)
    return {f"params/{name}": shape for name, shape in (_image(text.width) | _text(text)).items()}


def _image(target: int) -> Shapes:
    width, layers, heads, mlp = VISION.values()
    attention, each = "MultiHeadDotProductAttention_0", width // heads
    block: Shapes = {
        **{f"LayerNorm_{norm}/{part}": (width,) for norm in (0, 1) for part in ("bias", "scale")},
        "MlpBlock_0/Dense_0/bias": (mlp,),
        "MlpBlock_0/Dense_0/kernel": (width, mlp),
        "MlpBlock_0/Dense_1/bias": (width,),
        "MlpBlock_0/Dense_1/kernel": (mlp, width),
        **{f"{attention}/{part}/bias": (heads, each) for part in ("key", "query", "value")},
        **{f"{attention}/{part}/kernel": (width, heads, each) for part in ("key", "query", "value")},
        f"{attention}/out/bias": (width,),
        f"{attention}/out/kernel": (heads, each, width),
    }
    return {
        "img/Transformer/encoder_norm/bias": (width,),
        "img/Transformer/encoder_norm/scale": (width,),
        **{f"img/Transformer/encoderblock/{name}": (layers, *shape) for name, shape in block.items()},
        "img/embedding/bias": (width,),
        "img/embedding/kernel": (PATCH, PATCH, 3, width),
        "img/head/bias": (target,),
        "img/head/kernel": (width, target),
        "img/pos_embedding": (1, POSITIONS, width),
    }


def _text(text: TextShape) -> Shapes:
    width, each = text.width, text.head_width
    layer: Shapes = {
        "attn/attn_vec_einsum/w": (text.heads, each, width),
        "attn/kv_einsum/w": (2, text.key_heads, width, each),
        "attn/q_einsum/w": (text.heads, width, each),
        "mlp/gating_einsum": (2, width, text.mlp),
        "mlp/linear": (text.mlp, width),
        **{f"{norm}/scale": (width,) for norm in ("post_attention_norm", "post_ffw_norm", "pre_attention_norm",
                                                  "pre_ffw_norm")},
    }  # fmt: skip
    return {
        "llm/embedder/input_embedding": (ROWS, width),
        "llm/final_norm/scale": (width,),
        **{f"llm/layers/{name}": (text.layers, *shape) for name, shape in layer.items()},
    }


def write_checkpoint(path: Path, arrays: Shapes) -> int:
    """Write an .npz of these arrays in bfloat16; returns the bytes of its values."""
    noise = torch.rand(_BLOCK).sub_(0.5).mul_(0.05).to(torch.bfloat16)

    def blocks(count: int) -> Iterator[torch.Tensor]:
        for start in range(0, count, _BLOCK):
            yield noise[: min(_BLOCK, count - start)]

    outgoing = [
        Outgoing(name, shape, torch.bfloat16, lambda shape=shape: blocks(prod(shape)))
        for name, shape in arrays.items()
    ]
    write_npz(outgoing, path)
    return sum(each.nbytes for each in outgoing)


def write_sparse(path: Path, arrays: Shapes) -> int:
    """Write an .npz of these arrays in bfloat16 whose values are holes: it takes a few kilobytes of disk, and says
    that no checksums were computed. Returns the bytes of its values."""
    directory, total = [], 0
    with path.open("wb") as file:
        for name, shape in arrays.items():
            member = f"{name}.npy".encode()
            described = f"{{'descr': '<V2', 'fortran_order': False, 'shape': {shape!r}, }}"
            padding = -(10 + len(described) + 1) % 64
            array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(described) + padding + 1)
            array += described.encode() + b" " * padding + b"\n"
            values, header = 2 * prod(shape), file.tell()
            size, total = len(array) + values, total + values
            extra = struct.pack("<2H2Q", 1, 16, size, size)
            file.write(
                struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 33, 0, *[0xFFFFFFFF] * 2, len(member), len(extra))
            )
            file.write(member + extra + array)
            file.seek(values, 1)
            place = struct.pack("<2H3Q", 1, 24, size, size, header)
            directory.append(
                struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 33, 0, *[0xFFFFFFFF] * 2, len(member),
                            len(place), 0, 0, 0, 0, 0xFFFFFFFF) + member + place
            )  # fmt: skip
        start, entries, count = file.tell(), b"".join(directory), len(directory)
        end = start + len(entries)
        file.write(entries)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(entries), 0xFFFFFFFF, 0))
    return total
