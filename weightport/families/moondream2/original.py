"""The original's folder around its weights: config.json and tokenizer as its code reads them. The code itself (*.py)
is the original repository's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightport.families.moondream2.companions import FILES, read_json
from weightport.families.moondream2.tokenizer import original_tokenizer


def write_companions(directory: Path, config: Any, options: Mapping[str, Any], folder: Path) -> None:
    """Write what stands beside the original's weights into `folder`, from a converted `directory` and its record's
    `options` (empty without a record)."""
    files = dict(options.get("files") or {})
    files.setdefault("config.json", original_config(config))
    for name, data in files.items():
        # Names come out of conversion.json: nothing but the known files is written.
        if name in FILES:
            _write(folder / name, data)
    tokenizer = read_json(directory / "tokenizer.json")
    if isinstance(tokenizer, Mapping):
        data = original_tokenizer(tokenizer, options.get("image_token_added", True))
        _write(folder / "tokenizer.json", data)
        _write(folder / "vocab.json", data["model"]["vocab"])
        merges = [each if isinstance(each, str) else " ".join(each) for each in data["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def original_config(config: Any) -> dict[str, Any]:
    """The original's config.json of a native configuration."""
    text, vision = config.text_config, config.vision_config
    if config.feature_merge == "tiles":
        sizes = {
            "text": {
                "dim": text.hidden_size, "ff_dim": text.intermediate_size, "n_layers": text.num_hidden_layers,
                "vocab_size": text.vocab_size, "max_context": text.max_position_embeddings,
                "n_heads": text.num_attention_heads, "n_kv_heads": text.num_key_value_heads,
                "prefix_attn": config.image_seq_length + 1,
            },
            "vision": {
                "enc_dim": vision.hidden_size, "enc_patch_size": vision.patch_size,
                "enc_n_layers": vision.num_hidden_layers, "enc_ff_dim": vision.intermediate_size,
                "enc_n_heads": vision.num_attention_heads, "proj_out_dim": text.hidden_size,
                "crop_size": vision.image_size, "in_channels": 3, "overlap_margin": config.overlap_margin,
                "proj_inner_dim": config.projector_hidden_size,
            },
        }  # fmt: skip
        return {"architectures": ["HfMoondream"], "model_type": "moondream1", "config": sizes}
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "layer_norm_eps",
    )  # fmt: skip
    section = {"model_type": "phi", **{name: getattr(text, name) for name in fields}}
    section |= {name: text.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor")}
    name = "phi_config" if config.feature_merge == "none" else "text_config"
    return {"architectures": ["Moondream"], "model_type": "moondream1", name: section}


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
