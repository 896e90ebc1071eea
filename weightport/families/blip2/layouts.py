"""What a LAVIS checkpoint of BLIP-2 holds: which kind of model, which of its parts, and what else the file has.

The trainer saves what was trained under `model`, beside the optimizer's state and its own configuration; LAVIS also
reads a bare state dict. Frozen parts are left out by parameter name, so that tied aliases of frozen matrices stay in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightport.checkpoints import Checkpoint
from weightport.checkpoints.types import NamedTensors
from weightport.errors import CheckpointError

Kind = Literal["opt", "t5", "itm"]
"""Captioning and questions with OPT or T5, or stage 1: image-text matching, contrast and retrieval."""

Tower = Literal["eva", "clip"]
"""The vision encoder: EVA's ViT-g or CLIP's ViT-L."""

SECTION = "model"
VISION = "visual_encoder."
LANGUAGE: Mapping[Kind, str] = {"opt": "opt_model.", "t5": "t5_model."}
PROJECTION: Mapping[Kind, str] = {"opt": "opt_proj.weight", "t5": "t5_proj.weight"}
MATCHING = "itm_head.weight"
TEXT_EMBEDDING = "Qformer.bert.embeddings.word_embeddings.weight"

_MARK = re.compile(r"(model\.)?Qformer\.bert\.encoder\.layer\.0\..+")
_UNREAD = {"optimizer": "optimizer state", "scaler": "gradient scaler"}
_SETTINGS = (
    "arch", "model_type", "vit_model", "image_size", "freeze_vit", "vit_precision", "num_query_token", "prompt",
    "max_txt_len", "opt_model", "t5_model",
)  # fmt: skip

ALIASES: Mapping[Kind, tuple[str, ...]] = {
    "opt": ("opt_model.lm_head.weight",),
    "t5": ("t5_model.encoder.embed_tokens.weight", "t5_model.decoder.embed_tokens.weight"),
}
"""Further names of the frozen language model's embedding, which the trainer leaves in a checkpoint."""


@dataclass(frozen=True)
class Found:
    """The trained parts in a checkpoint, under LAVIS's names.

    `aliases` are tied names of a frozen matrix that is not in the file. `settings` are what the trainer's
    configuration says of the model; `unread` are the bytes of other sections.
    """

    kind: Kind
    section: str
    tensors: NamedTensors
    aliases: NamedTensors
    settings: Mapping[str, Any]
    unread: Mapping[str, int]

    @property
    def has_vision(self) -> bool:
        """Whether the vision encoder was trained, and so is in the file."""
        return any(name.startswith(VISION) for name in self.tensors)

    @property
    def has_language(self) -> bool:
        """Whether the file holds a whole language model."""
        return self.kind != "itm" and any(name.startswith(LANGUAGE[self.kind]) for name in self.tensors)


def is_blip2(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a LAVIS BLIP-2 (or of a model that has its Q-Former)."""
    return any(map(_MARK.fullmatch, names))


def locate(checkpoint: Checkpoint) -> Found:
    """The BLIP-2 in a checkpoint. Raises CheckpointError for InstructBLIP, and for what is no BLIP-2 of LAVIS."""
    section = SECTION if any(name.startswith(f"{SECTION}.Qformer.") for name in checkpoint) else ""
    tensors = checkpoint.section(section)
    _refuse_instruct(checkpoint, tensors)
    kind = _kind(checkpoint, tensors)
    aliases = _stray_aliases(kind, tensors)
    unread: dict[str, int] = {}
    for name, ref in checkpoint.items():
        if section and not name.startswith(f"{section}."):
            top = name.partition(".")[0]
            said = _UNREAD.get(top, top)
            unread[said] = unread.get(said, 0) + ref.nbytes
    return Found(kind, section, tensors.without(aliases), aliases, _settings(checkpoint.document), unread)


def _refuse_instruct(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    known = set(names)
    reads_text = TEXT_EMBEDDING in known and MATCHING not in known and bool(known & set(PROJECTION.values()))
    if "llm_proj.weight" in known or reads_text:
        raise CheckpointError(
            f"{checkpoint.path} is an InstructBLIP, whose Q-Former reads the instruction too. weightport converts "
            "BLIP-2 only."
        )


def _kind(checkpoint: Checkpoint, names: Iterable[str]) -> Kind:
    known = set(names)
    if MATCHING in known:
        return "itm"
    for kind, name in PROJECTION.items():
        if name in known:
            return kind
    raise CheckpointError(
        f"{checkpoint.path} has a Q-Former, but none of {MATCHING}, {', '.join(PROJECTION.values())}: it is no whole "
        "BLIP-2 of LAVIS. `weightport inspect` lists what is in it."
    )


def _stray_aliases(kind: Kind, tensors: NamedTensors) -> NamedTensors:
    """The tied names that stand in the file without their language model."""
    if kind == "itm":
        return NamedTensors()
    strays = [name for name in tensors if name.startswith(LANGUAGE[kind])]
    alone = set(strays) <= set(ALIASES[kind])
    return NamedTensors(tensors[name] for name in strays) if alone else NamedTensors()


def _settings(document: Any) -> dict[str, Any]:
    """What the trainer's configuration says of the model, as far as it is plain data and not a path."""
    config = document.get("config") if isinstance(document, Mapping) else None
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping):
        return {}
    return {key: model[key] for key in _SETTINGS if isinstance(model.get(key), (str, int, float, bool))}
