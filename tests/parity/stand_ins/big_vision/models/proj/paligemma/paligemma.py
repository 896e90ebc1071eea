"""Image tokens before text tokens, as big_vision's PaliGemma puts them; the names of its outputs."""

import importlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def make_attn_mask(input_mask, mask_ar):
    order = jnp.cumsum(mask_ar, axis=1)
    return (order[:, None, :] <= order[:, :, None]) & (input_mask[:, None, :] * input_mask[:, :, None]).astype(bool)


class Model(nn.Module):
    img: Any = None
    llm: Any = None

    def setup(self):
        text = importlib.import_module("big_vision.models.proj.paligemma.gemma_bv")
        image = importlib.import_module("big_vision.models.vit")
        self._llm = text.Model(**self.llm, name="llm")
        self._img = image.Model(num_classes=self._llm.embdim, **self.img, name="img")

    def embed_text(self, tokens, train=False):
        return self._llm.embed_tokens(tokens), {}

    def embed_image_and_text(self, image, text, *, input_mask=None, mask_ar=None, train=False):
        zimg, out = self._img(image)
        out = {f"img/{name}": value for name, value in dict(out, zimg=zimg).items()}
        input_mask = jnp.ones(text.shape, bool) if input_mask is None else input_mask
        pad = ((0, 0), (zimg.shape[1], 0))
        x = jnp.concatenate([zimg, self._llm.embed_tokens(text)], axis=1)
        return (x, jnp.pad(input_mask, pad, constant_values=True), jnp.pad(mask_ar, pad)), out

    def __call__(self, image, text, mask_ar, train=False):
        (x, input_mask, mask_ar), out = self.embed_image_and_text(image, text, mask_ar=mask_ar)
        _, found = self._llm(x, mask=make_attn_mask(input_mask, mask_ar))
        out.update({f"llm/{name}": value for name, value in found.items()})
        logits = self._llm.compute_logits(found["pre_logits"][:, out["img/zimg"].shape[1] :])
        return logits, dict(out, text_logits=logits)

    def prefill_cache(self, x, input_mask, mask_ar, *, cache_size):
        return self._llm.prefill_cache(x, input_mask, make_attn_mask(input_mask, mask_ar), cache_size=cache_size)

    def extend_cache(self, x):
        return self._llm.extend_cache(x)
