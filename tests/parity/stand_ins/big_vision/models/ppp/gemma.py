"""A text model with the names, options and habits of big_vision's gemma: attention logits are cast to float32, layers
are scanned, the cache has a type of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

import big_vision.utils

utils = big_vision.utils


def get_config(variant):
    if variant != "gemma_tiny":
        raise ValueError(f"Unknown variant: {variant}")
    sizes = {"width": 8, "depth": 3, "mlp_dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "vocab_size": 40}
    return ml_collections.ConfigDict({"variant": variant, **sizes})


class Einsum(nn.Module):
    shape: tuple

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(0.3), self.shape))


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.normal(0.1), (x.shape[-1],))
        return x * jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)) * (1 + scale)


class Attention(nn.Module):
    heads: int
    kv_heads: int
    width: int
    head_dim: int
    cache_dtype: str

    def setup(self):
        self.q_einsum = Einsum((self.heads, self.width, self.head_dim))
        self.kv_einsum = Einsum((2, self.kv_heads, self.width, self.head_dim))
        self.attn_vec_einsum = Einsum((self.heads, self.head_dim, self.width))

    @nn.compact
    def __call__(self, x, mask, decode):
        q = self.q_einsum("BTD,NDH->BTNH", x) * self.head_dim**-0.5
        k, v = self.kv_einsum("BSD,2KDH->2BSKH", x)
        if decode:
            begun, shape = self.has_variable("cache", "idx"), (k.shape[0], mask.shape[-1], *k.shape[2:])
            idx = self.variable("cache", "idx", jnp.zeros, (k.shape[0],), jnp.int32)
            kept = [
                self.variable("cache", name, jnp.zeros, shape, self.cache_dtype) for name in ("k_cache", "v_cache")
            ]
            for cache, new in zip(kept, (k, v)):
                start = (0, idx.value[0] if begun else 0, 0, 0)
                cache.value = jax.lax.dynamic_update_slice(cache.value, new.astype(self.cache_dtype), start)
            idx.value = idx.value + k.shape[1]
            k, v = (cache.value.astype(q.dtype) for cache in kept)
        q = q.reshape(*q.shape[:2], self.kv_heads, -1, self.head_dim)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k)
        logits = logits.astype(jnp.float32)
        probs = jax.nn.softmax(jnp.where(mask[:, :, None], logits, -2e38), axis=-1).astype(k.dtype)
        encoded = jnp.einsum("BKGTS,BSKH->BTKGH", probs, v)
        return self.attn_vec_einsum("BTNH,NHD->BTD", encoded.reshape(*encoded.shape[:2], self.heads, self.head_dim))


class FeedForward(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", nn.initializers.normal(0.3), (2, x.shape[-1], self.hidden))
        linear = self.param("linear", nn.initializers.normal(0.3), (self.hidden, x.shape[-1]))
        return jnp.dot(nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), linear)


class Block(nn.Module):
    heads: int
    kv_heads: int
    width: int
    head_dim: int
    hidden: int
    cache_dtype: str

    def setup(self):
        self.pre_attention_norm, self.pre_ffw_norm = RMSNorm(), RMSNorm()
        self.attn = Attention(self.heads, self.kv_heads, self.width, self.head_dim, self.cache_dtype)
        self.mlp = FeedForward(self.hidden)

    def __call__(self, x, unused, mask, decode):
        x = x + self.attn(self.pre_attention_norm(x), mask, decode)
        return x + self.mlp(self.pre_ffw_norm(x)), unused


class Embedder(nn.Module):
    vocab_size: int
    width: int

    def setup(self):
        self.table = self.param("input_embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))

    def encode(self, ids):
        x = self.table[ids]
        return x * jnp.sqrt(self.width).astype(x.dtype)

    def decode(self, x):
        return jnp.dot(x, self.table.T)


class Model(nn.Module):
    variant: str
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    cache_dtype: str
    scan: bool
    embed_dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens, *, embedded_prefix=None, embed_only=False, pre_logits=None, mask=None, decode=False):
        embedder = Embedder(self.vocab_size, self.width, name="embedder")
        if pre_logits is not None:
            return embedder.decode(pre_logits), {}
        parts = [
            part for part in (embedded_prefix, None if tokens is None else embedder.encode(tokens)) if part is not None
        ]
        x = jnp.concatenate(parts, axis=-2).astype(self.embed_dtype)
        if embed_only:
            return x
        settings = (self.num_heads, self.num_kv_heads, self.width, self.head_dim, self.mlp_dim, self.cache_dtype)
        block = nn.remat(Block, prevent_cse=False, static_argnums=(4,))
        layers, mask = self.scope.push("layers"), mask[:, None]
        if self.scan:
            axes, rngs = {"params": 0, "cache": 1}, {"params": True}
            stack = nn.scan(block, variable_axes=axes, split_rngs=rngs, in_axes=nn.broadcast, length=self.depth)
            x, _ = stack(*settings, parent=layers)(x, (), mask, decode)
        else:
            for layer in range(self.depth):
                x, _ = block(*settings, parent=layers.push(str(layer)))(x, (), mask, decode)
        assert x.dtype == jnp.dtype(self.embed_dtype)
        x = RMSNorm(name="final_norm")(x)
        return embedder.decode(x), {"pre_logits": x}
