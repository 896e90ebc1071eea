"""The original's folder around its weights: config.json, tokenizer and image settings as the remote code reads
them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightport.errors import CheckpointError
from weightport.families.florence2.companions import read_companion
from weightport.families.florence2.configuration import FEATURE_SOURCES
from weightport.families.florence2.images import PREPROCESSOR
from weightport.families.florence2.rules import original_rows
from weightport.families.florence2.tokenizer import original_tokenizer

_VISION_FIELDS = {
    "embed_dim": "dim_embed", "depths": "depths", "num_heads": "num_heads", "num_groups": "num_groups",
    "window_size": "window_size", "patch_size": "patch_size", "patch_stride": "patch_stride",
    "patch_padding": "patch_padding", "patch_prenorm": "patch_prenorm", "drop_path_rate": "drop_path_rate",
    "projection_dim": "projection_dim",
}  # fmt: skip
_TEXT_FIELDS = (
    "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
    "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "activation_function", "dropout",
    "attention_dropout", "activation_dropout", "classifier_dropout", "encoder_layerdrop", "decoder_layerdrop",
    "init_std", "scale_embedding", "bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id",
    "forced_eos_token_id",
)  # fmt: skip
# What every release says of generation, and BartConfig does not carry.
_RELEASED_GENERATION = {
    "num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True, "forced_bos_token_id": 0,
}  # fmt: skip


def write_companions(directory: Path, config: Any, options: Mapping[str, Any], folder: Path) -> None:
    """Write what stands beside the original's weights into `folder`, from a converted `directory` and its record's
    `options` (empty without a record). The remote code's own .py files are the original repository's."""
    recorded = options.get("config")
    _write(folder / "config.json", original_config(config) if recorded is None else recorded)
    for name, data in (options.get("files") or {}).items():
        # Names come out of conversion.json: nothing but a file name in the folder is written.
        if Path(name).name == name and name.endswith(".json"):
            _write(folder / name, data)
    processor = directory / "processor_config.json"
    if processor.is_file() and not (folder / PREPROCESSOR).exists():
        _write(folder / PREPROCESSOR, original_images(read_companion(processor)))
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file():
        data = _read(tokenizer)
        image = options.get("image_token")
        if image is not None:
            data = original_tokenizer(data, image["replaces"], image["id"], image["added"])
        _write(folder / "tokenizer.json", data)
        _write(folder / "vocab.json", data["model"]["vocab"])
        if not (folder / "tokenizer_config.json").exists():
            _write(folder / "tokenizer_config.json", {"tokenizer_class": "BartTokenizerFast"})


def original_images(processor: Any) -> dict[str, Any]:
    """The remote code's preprocessor_config.json of a native processor's settings. Raises CheckpointError."""
    settings = processor.get("image_processor") if isinstance(processor, Mapping) else None
    if not isinstance(settings, Mapping):
        raise CheckpointError("processor_config.json holds no image_processor, so the size of pictures is not known.")
    return {**settings, "processor_class": "Florence2Processor", "do_convert_rgb": None}


def original_config(config: Any) -> dict[str, Any]:
    """The remote code's config.json of a native configuration, with the releases' generation settings."""
    text = {name: getattr(config.text_config, name) for name in _TEXT_FIELDS}
    vision = {original: getattr(config.vision_config, name) for name, original in _VISION_FIELDS.items()}
    rows = original_rows(config)
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_florence2.Florence2Config",
            "AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration",
        },
        "model_type": "florence2",
        "is_encoder_decoder": True,
        "ignore_index": -100,
        **{name: text[name] for name in ("bos_token_id", "pad_token_id", "eos_token_id")},
        "projection_dim": vision["projection_dim"],
        "vocab_size": rows,
        "text_config": {
            **text, **_RELEASED_GENERATION, "vocab_size": rows, "is_encoder_decoder": True,
            "num_hidden_layers": text["encoder_layers"],
        },
        "vision_config": {
            "model_type": "davit", **vision, "enable_checkpoint": False, "image_feature_source": FEATURE_SOURCES,
            "visual_temporal_embedding": {
                "type": "COSINE", "max_temporal_embeddings": config.vision_config.max_temporal_embeddings,
            },
            "image_pos_embed": {
                "type": "learned_abs_2d", "max_pos_embeddings": config.vision_config.max_position_embeddings,
            },
        },
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {**data, "model": {**data["model"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}.") from error


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
