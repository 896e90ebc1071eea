"""Writes a tiny npz in big_vision's layout, in an environment with JAX: tiny_paligemma.py SCRIPT OUT.npz [options].

Options: `unstacked` (vision layers one by one), `bfloat16` (raw two-byte values), `missing`, `surplus`.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

STAND_INS = Path(__file__).parent


def main(script: str, out: str, *options: str) -> None:
    spec = importlib.util.spec_from_file_location("dump_paligemma2", script)
    dump = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dump)
    import jax

    image = {"width": 12, "depth": 2, "mlp_dim": 16, "num_heads": 3, "patch_size": (4, 4), "pool_type": "none",
             "scan": "unstacked" not in options}  # fmt: skip
    text = {"variant": "gemma_tiny", "vocab_size": 40, "scan": True, "cache_dtype": "float32"}
    original = dump.Original(STAND_INS, image, text)
    given = {"image": np.zeros((1, 8, 8, 3), np.float32), "text": np.zeros((1, 3), np.int32),
             "mask_ar": np.zeros((1, 3), np.int32)}  # fmt: skip
    with original.computing("float32") as model:
        params = model.init(jax.random.PRNGKey(0), **given)["params"]
    random = np.random.default_rng(0)
    arrays = {key: np.array(value) + random.normal(0, 0.1, value.shape) for key, value in dump.flat(params).items()}
    arrays = {"params/" + key: value.astype(np.float32) for key, value in arrays.items()}
    if "bfloat16" in options:
        arrays = {key: (value.view(np.uint32) >> 16).astype(np.uint16).view("V2") for key, value in arrays.items()}
    if "missing" in options:
        del arrays["params/llm/layers/pre_ffw_norm/scale"]
    if "surplus" in options:
        arrays["params/llm/layers/post_ffw_norm/scale"] = np.ones((3, 8), np.float32)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
