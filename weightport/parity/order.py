"""Seams in forward order, and which of them are the end of what a run computes."""

from __future__ import annotations

from weightport.parity.family import Family
from weightport.parity.invariance import INVARIANCES
from weightport.parity.reference import Reference
from weightport.parity.seams import base_seam
from weightport.parity.training import AFTER, GRADIENT, GRADIENT_NORM, TOTAL_NORM

GENERATED = ("sequences", "scores", "positional_scores")
OUTCOMES = ("logits", "loss", TOTAL_NORM, *GENERATED, *INVARIANCES)


def forward_order(family: Family, reference: Reference) -> tuple[str, ...]:
    """Every seam of a reference, and the invariances, in forward order."""
    seams = {each.seam for run in reference.runs for each in run.outputs}
    return (*sorted(seams, key=lambda seam: seam_order(family, seam)), *INVARIANCES)


def seam_order(family: Family, seam: str) -> tuple[int, int, str]:
    """Sort key that puts seams in forward order: the family's own, then losses, gradients and hypotheses."""
    name, derivation = base_seam(seam)
    for place, each in enumerate(family.seams):
        layer = each.layer_of(name)
        if layer is not None:
            return _stage(family, place, layer), int(layer or 0), f"{place:04d}{derivation}"
    later = [*family.losses, TOTAL_NORM, *GENERATED]
    place = later.index(name) if name in later else len(later)
    return len(family.seams) + place, 0, name


def _stage(family: Family, place: int, layer: str) -> int:
    """Seams of one stack are interleaved by layer: they share the first one's place."""
    if not layer:
        return place
    stack = family.seams[place].name.partition("*")[0]
    return next(i for i, each in enumerate(family.seams) if each.name.partition("*")[0] == stack and "*" in each.name)


def is_outcome(family: Family, seam: str) -> bool:
    """Whether a seam is what a run is for (logits, losses, gradients, ids) and not a place on the way there."""
    name, _ = base_seam(seam)
    return name in OUTCOMES or name in family.losses or name.startswith((GRADIENT, GRADIENT_NORM, AFTER))
