"""The three files of one BLIP-2 as one set of tensors under LAVIS's names, and what of them is not used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.checkpoints.sources import MAIN, CombinedTensors, Sources, combine
from weightport.checkpoints.types import NamedTensors
from weightport.errors import CheckpointError, ConfigurationError, UsageError
from weightport.families.blip2.layouts import LANGUAGE, VISION, Found, Kind

LLM, VISION_FILE = "llm", "vision"
TITLES: Mapping[Kind, str] = {"opt": "OPT", "t5": "Flan-T5", "itm": "none"}
_EVA, _CLIP = "blocks.0.attn.q_bias", "transformer.resblocks.0.attn.in_proj_weight"
TOWERS = {"eva_clip_g": ("eva_vit_g.pth", _EVA), "clip_L": ("clip_vit_L.pth", _CLIP)}
_EMBEDDING: Mapping[Kind, str] = {
    "opt": "opt_model.model.decoder.embed_tokens.weight",
    "t5": "t5_model.shared.weight",
}
_ROWS = 4096  # of an embedding, compared at a time


@dataclass(frozen=True)
class Whole:
    """A model of several sources. `language_config` is the language model's config.json and `embedding` its table of
    tokens; None for stage 1."""

    combined: CombinedTensors
    unused: Mapping[str, str]
    language_config: Mapping[str, Any] | None
    embedding: TensorRef | None


def gather(sources: Sources, found: Found) -> Whole:
    """The trained parts with what the other sources give. Raises UsageError for a source that is missing or is not
    asked for, CheckpointError for one that is of another kind, ConfigurationError where two contradict each other."""
    parts, unused = {MAIN: found.tensors}, dict[str, str]()
    _refuse_other_tower(sources, found)
    if VISION_FILE in sources:
        parts[VISION_FILE] = _vision(sources[VISION_FILE])
        if found.has_vision:
            unused |= dict.fromkeys(parts.pop(VISION_FILE), "the checkpoint holds a fine-tuned vision encoder")
    elif not found.has_vision:
        raise UsageError(
            f"{sources.main.path} does not hold the vision encoder, which was frozen in training: give its file with "
            "--vision (eva_vit_g.pth, or clip_vit_L.pth of a model with ViT-L)."
        )
    config = embedding = None
    if found.kind == "itm":
        if LLM in sources:
            raise UsageError(f"--llm: {sources.main.path} is a stage-1 checkpoint, which has no language model.")
    else:
        config = _language_config(sources, found)
        parts[LLM] = _language(sources[LLM], found.kind)
        embedding = _embedding(sources[LLM], found.kind, parts[LLM])
        _compare_aliases(sources, found, embedding)
        why = "another name of the frozen embedding, which the language model's folder gives"
        unused |= dict.fromkeys(found.aliases, why)
    combined = combine(parts)
    for hidden in combined.shadowed.values():
        unused |= dict.fromkeys(hidden, "the checkpoint holds it too")
    return Whole(combined, unused, config, embedding)


def _refuse_other_tower(sources: Sources, found: Found) -> None:
    """Raise CheckpointError for a vision file of the kind that the checkpoint's configuration does not name."""
    stated = TOWERS.get(str(found.settings.get("vit_model")))
    if VISION_FILE not in sources or stated is None:
        return
    file, mark = stated
    if mark not in sources[VISION_FILE] and any(other in sources[VISION_FILE] for other in (_EVA, _CLIP)):
        raise CheckpointError(
            f"{sources[VISION_FILE].path} is not the vision encoder that {sources.main.path} was trained with: its "
            f"configuration names {found.settings['vit_model']}, which is {file}."
        )


def _vision(checkpoint: Checkpoint) -> NamedTensors:
    if _EVA not in checkpoint and _CLIP not in checkpoint:
        raise CheckpointError(
            f"{checkpoint.path} is no vision encoder of LAVIS: expected {_EVA}, as eva_vit_g.pth has it, or {_CLIP}, "
            "as clip_vit_L.pth. `weightport inspect` lists what is in it."
        )
    return checkpoint.section("").renamed(lambda name: VISION + name)


def _language_config(sources: Sources, found: Found) -> Mapping[str, Any]:
    title = TITLES[found.kind]
    if LLM not in sources:
        strays = f" ({', '.join(found.aliases)} is but a tied copy of its embedding)" if found.aliases else ""
        raise UsageError(
            f"{sources.main.path} does not hold the language model{strays}: give {title}'s folder with --llm "
            f"({_trained_with(found)})."
        )
    folder = sources[LLM]
    document = folder.document if isinstance(folder.document, Mapping) else {}
    config = document.get("config")
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{folder.path} has no config.json. --llm takes the whole folder of a language model.")
    if config.get("model_type") != found.kind:
        raise CheckpointError(
            f"{folder.path} is of the model_type {config.get('model_type')!r}; the checkpoint has a projection to "
            f"{title}."
        )
    return config


def _trained_with(found: Found) -> str:
    named = found.settings.get(f"{found.kind}_model")
    return f"its configuration names {named}" if named else "the one that it was trained with"


def _language(folder: Checkpoint, kind: Kind) -> NamedTensors:
    """The language model's tensors as LAVIS calls them. Raises CheckpointError for a T5 without a head of its own."""
    tensors = folder.section("")
    if kind == "opt" and any(name.startswith("decoder.") for name in tensors):
        # Some published OPT files are of the model below the head.
        tensors = tensors.renamed(lambda name: name if name.startswith("lm_head.") else f"model.{name}")
    if kind == "t5" and "lm_head.weight" not in tensors:
        raise CheckpointError(
            f"{folder.path} has no lm_head.weight. Flan-T5's output head is not its embedding, and without it the "
            "model would answer nonsense: give the whole folder."
        )
    return tensors.renamed(lambda name: LANGUAGE[kind] + name)


def _embedding(folder: Checkpoint, kind: Kind, language: NamedTensors) -> TensorRef:
    """The table of tokens, whose sizes a config.json leaves out where they are the class's defaults."""
    name = _EMBEDDING[kind]
    table = language.get(name)
    if table is None or len(table.shape) != 2:
        found = "" if table is None else f": it has the shape {list(table.shape)}"
        raise CheckpointError(f"{folder.path} has no matrix {name.removeprefix(LANGUAGE[kind])}{found}.")
    return table


def _compare_aliases(sources: Sources, found: Found, own: TensorRef) -> None:
    """The embedding that the trainer left in the checkpoint must be the folder's: else it is another model's."""
    for alias in found.aliases.values():
        if alias.shape != own.shape or not _same_values(alias, own):
            raise ConfigurationError(
                f"{alias.name} in {sources.main.path}, which the trainer left there, is not the embedding of "
                f"{sources[LLM].path}: {list(alias.shape)} and {list(own.shape)}"
                + (", of other values" if alias.shape == own.shape else "")
                + f".\n  Give the language model that the checkpoint was trained with ({_trained_with(found)})."
            )


def _same_values(alias: TensorRef, own: TensorRef) -> bool:
    """Whether `alias` holds `own`'s values, as far as its dtype holds them."""
    starts = range(0, own.shape[0], _ROWS)
    return all(
        torch.equal(alias.rows(start, end), own.rows(start, end).to(alias.dtype))
        for start, end in ((start, min(start + _ROWS, own.shape[0])) for start in starts)
    )
