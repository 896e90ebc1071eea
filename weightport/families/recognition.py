"""Which family a checkpoint belongs to, told from the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from weightport.checkpoints import Checkpoint
from weightport.converters.family import Family
from weightport.errors import UnknownFamilyError
from weightport.families import FAMILIES


@dataclass(frozen=True)
class Signature:
    """A tensor name that only this kind of checkpoint has."""

    kind: str
    name: re.Pattern[str]

    @property
    def native(self) -> bool:
        """Whether it is what a conversion gives."""
        return self.kind.startswith(NATIVE)


NATIVE = "a native "


# For the error message: what a checkpoint that the asked-for family does not recognise looks like.
SIGNATURES = tuple(
    Signature(kind, re.compile(pattern))
    for kind, pattern in (
        ("a native OFA model", r"model\.encoder\.image_rel_pos_tables\.0\.weight"),
        ("OFA (fairseq)", r"(model\.)?encoder\.image_rel_pos_table_list\.0\.weight"),
        ("a native Florence-2 model", r"model\.multi_modal_projector\.image_position_embed\..+"),
        ("Florence-2 (remote code)", r"(.+\.)?image_pos_embed\.(row|column)_embeddings\.weight"),
        (
            "Moondream2",
            r"(.+\.)?(text_model\.transformer\.h\.0\.mixer\.Wqkv\.weight|text\.blocks\.0\.attn\.qkv\.weight)",
        ),
        ("PaliGemma (big_vision)", r"(params/|opt/target/)?llm/layers/attn/(q|qkv)_einsum/w"),
        ("BLIP-2 (LAVIS)", r"(model\.)?Qformer\.bert\.encoder\.layer\.0\..+"),
        ("a native BLIP-2 model", r"qformer\.encoder\.layer\.0\..+"),
        ("BART (fairseq)", r"(model\.)?encoder\.sentence_encoder\..+|(model\.)?encoder\.layers\.0\.fc1\.weight"),
        ("a LoRA adapter", r".+\.lora_A\.(.+\.)?weight"),
    )
)


def looks_like(names: Iterable[str]) -> str | None:
    """The kind of checkpoint that tensors with these names are, or None."""
    found = _signature(names)
    return found.kind if found is not None else None


def _signature(names: Iterable[str]) -> Signature | None:
    known = tuple(names)
    return next((s for s in SIGNATURES if any(s.name.fullmatch(name) for name in known)), None)


def recognise(checkpoint: Checkpoint, family: str | None = None) -> Family:
    """The family of the checkpoint. Raises UnknownFamilyError, also when it is not the one asked for."""
    if not checkpoint:
        raise UnknownFamilyError(f"{checkpoint.path} holds no tensors, so it is not a model's checkpoint.")
    if family is not None and FAMILIES[family].recognises(checkpoint):
        return FAMILIES[family]
    matching = next((f for f in FAMILIES.values() if f.recognises(checkpoint)), None)
    if family is None and matching is not None:
        return matching
    signature = _signature(checkpoint)
    if signature is not None and signature.native:
        raise UnknownFamilyError(
            f"{checkpoint.path} is {signature.kind} already: there is nothing to convert. `weightport generate "
            f"{checkpoint.path} IMAGE` tries it, `weightport export {checkpoint.path} TARGET` gives the original "
            "format back."
        )
    kind = matching.title if matching is not None else looks_like(checkpoint)
    wanted = FAMILIES[family].title if family is not None else " or ".join(f.title for f in FAMILIES.values())
    shown = ", ".join(list(checkpoint)[:3])
    raise UnknownFamilyError(
        f"{checkpoint.path} is not a checkpoint of {wanted}: it looks like {kind or 'none that weightport knows'} "
        f"({len(checkpoint)} tensors: {shown}, …).\n"
        "  `weightport inspect` lists what is in it."
    )
