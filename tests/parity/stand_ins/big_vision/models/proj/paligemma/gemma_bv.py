"""The wrapper around the text model: prompts aligned to the right, a cache that is bfloat16 unless told otherwise."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vision.models.ppp import gemma


def _config(model):
    config = gemma.get_config(model.variant)
    config.scan, config.cache_dtype = model.scan, model.cache_dtype
    config.vocab_size = model.vocab_size or config.vocab_size
    return config


@jax.vmap
def _right_aligned(x, input_mask, attn_mask):
    length = jnp.sum(input_mask)
    return jnp.roll(x, -length, 0), jnp.roll(input_mask, -length, 0), jnp.roll(attn_mask, -length, (0, 1))


class Model(nn.Module):
    variant: str = "gemma_tiny"
    scan: bool = True
    vocab_size: int | None = None
    cache_dtype: str = "bfloat16"
    final_logits_softcap: float | None = None

    def setup(self):
        self.model = gemma.Model(**_config(self), parent=self.scope, name="")

    @property
    def embdim(self):
        return _config(self).width

    def embed_tokens(self, tokens, train=False):
        return self.model(tokens, embed_only=True)

    def compute_logits(self, pre_logits, train=False):
        return self.model(None, pre_logits=pre_logits)[0]

    def __call__(self, embs, mask=None, train=False):
        return self.model(jnp.zeros([len(embs), 0], dtype=jnp.int32), embedded_prefix=embs, mask=mask)

    def prefill_cache(self, x, input_mask, attn_mask, *, cache_size):
        x, input_mask, attn_mask = _right_aligned(x, input_mask, attn_mask)
        length = x.shape[1]
        self.put_variable("cache", "begin", length - jnp.sum(input_mask, axis=-1))
        self.put_variable("cache", "end", jnp.full((len(x),), length, jnp.int32))
        mask = jnp.pad(attn_mask, ((0, 0), (0, 0), (0, cache_size - length)))
        _, out = self.model(None, embedded_prefix=x, mask=mask, decode=True)
        return self.compute_logits(out["pre_logits"][:, -1:])

    def extend_cache(self, x):
        size = self.variables["cache"]["layers"]["attn"]["k_cache"].shape[2]
        begin, end = self.get_variable("cache", "begin"), self.get_variable("cache", "end") + 1
        self.put_variable("cache", "end", end)
        place = jnp.arange(size)[None, None]
        mask = (place >= begin[:, None, None]) & (place < end[:, None, None])
        return self.model(None, embedded_prefix=x, mask=mask, decode=True)[0]
