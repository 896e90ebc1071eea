"""The forms in which OFA models are found: fairseq training checkpoints, and directories of the existing ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.checkpoints.types import NamedTensors
from weightport.errors import CheckpointError
from weightport.families.ofa.fairseq_options import fairseq_options

FAIRSEQ = "fairseq"
PORT = "transformers-port"

_MARKS = ("encoder.embed_image_positions.weight", "decoder.embed_image_positions.weight", "encoder.image_proj.weight")
_NATIVE = "encoder.image_rel_pos_tables.0.weight"  # the native model has the marks too, and calls this one otherwise
_EMA = "extra_state.ema"

# config.json of the existing ports → options as fairseq names them. One flag stands for three there.
_PORT_OPTIONS = {
    "attn_scale_factor": "attn_scale_factor",
    "activation_function": "activation_fn",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "encoder_layerdrop": "encoder_layerdrop",
    "decoder_layerdrop": "decoder_layerdrop",
    "encoder_drop_path_rate": "encoder_drop_path_rate",
    "decoder_drop_path_rate": "decoder_drop_path_rate",
    "resnet_drop_path_rate": "resnet_drop_path_rate",
    "resnet_type": "resnet_type",
    "code_image_size": "code_image_size",
    "entangle_position_embedding": "entangle_position_embedding",
    "token_bucket_size": "token_bucket_size",
    "image_bucket_size": "image_bucket_size",
}


@dataclass(frozen=True)
class Found:
    """The model section of a checkpoint under fairseq's names, and its options (None when the file holds none)."""

    layout: str
    section: str
    tensors: NamedTensors
    model_options: Mapping[str, Any] | None
    task_options: Mapping[str, Any]
    has_ema: bool


def is_ofa(names: Mapping[str, Any]) -> bool:
    """Whether these tensor names are an OFA model's, at the top level or below `model`."""
    return any(
        all(prefix + mark in names for mark in _MARKS) and prefix + _NATIVE not in names for prefix in ("", "model.")
    )


def locate(checkpoint: Checkpoint, *, ema: bool) -> Found:
    """The model inside the checkpoint. Raises CheckpointError when `ema` is asked for and there is none."""
    in_training_file = all("model." + mark in checkpoint for mark in _MARKS)
    averaged = checkpoint.section(_EMA)
    if ema and not averaged:
        raise CheckpointError(
            f"{checkpoint.path} holds no averaged weights (extra_state.ema). They are written by training with "
            "--store-ema; leave --ema out to convert the model's own weights."
        )
    section = _EMA if ema else "model" if in_training_file else ""
    tensors = checkpoint.section(section)
    if _is_port(tensors):
        return Found(PORT, section, _fairseq_names(tensors), _port_options(checkpoint), {}, False)
    if not _has_options(checkpoint.document):
        return Found(FAIRSEQ, section, tensors, None, {}, bool(averaged))
    options = fairseq_options(checkpoint.document)
    task = {**_set(options.task), "task": options.task_name}
    return Found(FAIRSEQ, section, tensors, _set(options.model), task, bool(averaged))


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have a value: omegaconf writes ??? for one never set and ${…} for one looked up elsewhere."""
    return {name: value for name, value in options.items() if not str(value).startswith(("???", "${"))}


def _has_options(document: Any) -> bool:
    """Stripped files hold weights alone."""
    return isinstance(document, Mapping) and any(document.get(key) is not None for key in ("args", "cfg"))


def _is_port(tensors: Mapping[str, TensorRef]) -> bool:
    return any(name.startswith("decoder.layers.0.cross_attn.") for name in tensors)


def _fairseq_names(tensors: NamedTensors) -> NamedTensors:
    # Rules take torch; telling what a checkpoint is does not.
    from weightport.families.ofa.rules import PORT_TO_FAIRSEQ

    def fairseq_name(name: str) -> str:
        claim = next(PORT_TO_FAIRSEQ.of_source(name), None)
        return claim.rule.target_names(claim.captures)[0] if claim else name

    return tensors.renamed(fairseq_name)


def _port_options(checkpoint: Checkpoint) -> dict[str, Any] | None:
    document = checkpoint.document if isinstance(checkpoint.document, Mapping) else {}
    config = document.get("config")
    if not isinstance(config, Mapping):
        return None
    options = {option: config[field] for field, option in _PORT_OPTIONS.items() if field in config}
    # The ports' decoder never adds raw positions to its inputs.
    options["disable_entangle"] = True
    options["no_scale_embedding"] = not config.get("scale_embedding", False)
    return options
