"""A vision transformer with big_vision's names, options and outputs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Mlp(nn.Module):
    mlp_dim: int
    dtype_mm: str

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype_mm, name="Dense_0")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype_mm, name="Dense_1")(hidden)


class Block(nn.Module):
    mlp_dim: int
    num_heads: int
    dtype_mm: str

    @nn.compact
    def __call__(self, x, unused=None):
        out = {}
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads, dtype=self.dtype_mm, name="MultiHeadDotProductAttention_0"
        )
        x = out["+sa"] = x + attention(y, y)
        mlp = Mlp(self.mlp_dim, self.dtype_mm, name="MlpBlock_0")
        x = out["+mlp"] = x + mlp(nn.LayerNorm(name="LayerNorm_1")(x))
        return x, out


class Encoder(nn.Module):
    depth: int
    mlp_dim: int
    num_heads: int
    scan: bool
    dtype_mm: str

    @nn.compact
    def __call__(self, x):
        out, settings = {}, {"mlp_dim": self.mlp_dim, "num_heads": self.num_heads, "dtype_mm": self.dtype_mm}
        if self.scan:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, kept = stack(name="encoderblock", **settings)(x, None)
            for layer in range(self.depth):
                out[f"block{layer:02d}"] = jax.tree.map(lambda value, layer=layer: value[layer], kept)
        else:
            for layer in range(self.depth):
                x, out[f"block{layer:02d}"] = Block(name=f"encoderblock_{layer}", **settings)(x)
        out["pre_ln"] = x
        return nn.LayerNorm(name="encoder_norm")(x), out


class Model(nn.Module):
    num_classes: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: Any
    pool_type: str = "none"
    scan: bool = False
    dtype_mm: str = "float32"

    @nn.compact
    def __call__(self, image, *, train=False):
        out, patch = {}, tuple(self.patch_size)
        image = jnp.asarray(image, self.dtype_mm)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", dtype=self.dtype_mm, name="embedding")(image)
        x = x.reshape(len(x), -1, self.width)
        x = out["with_posemb"] = x + self.param("pos_embedding", nn.initializers.normal(0.1), (1, *x.shape[1:]))
        settings = (self.depth, self.mlp_dim, self.num_heads, self.scan, self.dtype_mm)
        x, out["encoder"] = Encoder(*settings, name="Transformer")(x)
        out["encoded"] = x
        return nn.Dense(self.num_classes, name="head")(x), out
