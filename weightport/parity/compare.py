"""One seam of one run, native against original: errors beside what arithmetic allows, ids equal, tied, or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from weightport.parity.noise import SINGLE, Allowed, Noise, OwnNoise, scale_of
from weightport.parity.reference import Expected
from weightport.parity.seams import Observed

DOUBTFUL = (
    "the reference's own float32 lies further from its float64 than float32 explains: was it dumped with TF32 or "
    "autocast, or changed?"
)


class Verdict(StrEnum):
    """What a comparison says; only `DEPARTS` fails.

    `TIED`: choices of equal score in another order. `WITHIN_NOISE`: an error above the depth formula, and below what
    the original's own float32 lies from its float64 there. `PASSING`: an error above both, at a seam on the way, that
    no later seam of the run shows.
    """

    AGREES = "agrees"
    TIED = "tied"
    WITHIN_NOISE = "within the original's own noise"
    PASSING = "departs here only"
    DEPARTS = "departs"

    @property
    def passes(self) -> bool:
        return self is not Verdict.DEPARTS


@dataclass(frozen=True)
class Comparison:
    """A seam's figures. Errors are absolute, in the seam's own units; `scale` is the reference's root mean square.

    `dtype` is what the native model ran in, `against` what the original did. `own` is the original's own noise in the
    coarser of the two, measured or, in float64, inferred from float32; None where the reference holds one precision.
    `formula` is what the depth alone explains, where that is less than what is allowed. For ids,
    `agreement` is the part of them that is equal; for logits, the part of positions with the same argmax. `note` says
    what a figure cannot. `attention` is the native model's attention implementation, where several were asked for.
    """

    run: str
    seam: str
    dtype: str
    against: str
    verdict: Verdict
    shape: tuple[int, ...]
    largest: float | None = None
    mean: float | None = None
    scale: float | None = None
    allowed: float | None = None
    agreement: float | None = None
    note: str = ""
    attention: str = ""
    own: float | None = None
    formula: float | None = None

    @property
    def relative(self) -> float | None:
        """Largest error in units of the scale."""
        return self.largest / self.scale if self.largest is not None and self.scale else None

    @property
    def relative_allowed(self) -> float | None:
        return self.allowed / self.scale if self.allowed is not None and self.scale else None

    @property
    def relative_own(self) -> float | None:
        return self.own / self.scale if self.own is not None and self.scale else None


@dataclass(frozen=True)
class Place:
    """Where a comparison belongs, and how far into the model it lies. `floor`: the smallest scale to measure
    against. `own`: the original's own noise there, where it is known. `rounds`: numbers of float32 are among what made
    the value, whatever the run's type."""

    run: str
    dtype: torch.dtype
    depth: int
    noise: Noise
    floor: float = 0.0
    kinked: bool = False
    own: OwnNoise | None = None
    rounds: bool = False


def compare(observed: Observed, expected: Expected, place: Place) -> Comparison:
    """The native model's value at a seam against the original's."""
    reference, value = expected.tensor.read(), observed.value.detach().cpu()
    blank = Comparison(
        place.run, expected.seam, _name(place.dtype), _name(expected.dtype), Verdict.DEPARTS, tuple(reference.shape)
    )
    if reference.dtype.is_floating_point:
        if value.shape != reference.shape:
            return replace(blank, note=_shapes(value, reference))
        return _numbers(blank, value.double(), reference.double(), expected, place)
    if expected.seam == "sequences":
        value, reference = _same_length(value, reference)
    if value.shape != reference.shape:
        return replace(blank, note=_shapes(value, reference))
    return _ids(blank, value, reference, observed.shortfall, expected, place)


def compare_generation(
    observed: Mapping[str, Observed], expected: Mapping[str, Expected], place: Place
) -> list[Comparison]:
    """Hypotheses and their scores together: where beams of equal score changed places, they are tied, not wrong.

    Keys are `sequences`, `scores`, `positional_scores`, as far as the reference has them.
    """
    if "sequences" not in observed:
        return [compare(observed[seam], expected[seam], place) for seam in observed]
    ids = compare(observed["sequences"], expected["sequences"], place)
    scores = compare(observed["scores"], expected["scores"], place) if "scores" in observed else None
    own, theirs = observed["sequences"].value.cpu(), expected["sequences"].tensor.read()
    results = [ids]
    equal = None
    if own.shape[:2] == theirs.shape[:2]:
        own, theirs = _same_length(own, theirs)
        equal = (own == theirs).all(-1)
        if not ids.verdict.passes and scores is not None and scores.verdict.passes:
            # Every rank has the score it should have, so hypotheses that differ at a rank have equal scores.
            count = int((~equal).sum())
            results = [replace(ids, verdict=Verdict.TIED, note=f"{count} of {equal.numel()} hypotheses tied in score")]
    if scores is not None:
        results.append(scores)
    if "positional_scores" in observed:
        results.append(_positional(observed, expected, place, equal))
    return results


def _positional(
    observed: Mapping[str, Observed], expected: Mapping[str, Expected], place: Place, equal: torch.Tensor | None
) -> Comparison:
    """Log-probabilities of the tokens, of the hypotheses that both sides have at the same rank."""
    each = expected["positional_scores"]
    value, reference = _same_length(
        observed["positional_scores"].value.cpu().float(), each.tensor.read().float(), fill=0.0
    )
    if equal is not None and value.shape == reference.shape and not bool(equal.all()):
        value = torch.where(equal.unsqueeze(-1), value, reference)
    blank = Comparison(
        place.run, each.seam, _name(place.dtype), _name(each.dtype), Verdict.DEPARTS, tuple(reference.shape)
    )
    if value.shape != reference.shape:
        return replace(blank, note=_shapes(value, reference))
    return _numbers(blank, value.double(), reference.double(), each, place)


def _numbers(
    blank: Comparison, value: torch.Tensor, reference: torch.Tensor, expected: Expected, place: Place
) -> Comparison:
    scale = max(scale_of(reference), place.floor)
    allowed = Allowed.of(place.noise, place.own, scale, place.depth, (place.dtype, expected.dtype), place.kinked)
    if place.rounds:
        allowed = allowed.at_least(SINGLE * scale)
    agreement = None
    if expected.seam == "logits" and value.ndim and value.shape[-1] > 1 and value.numel():
        agreement = float((value.argmax(-1) == reference.argmax(-1)).double().mean())
    blank = replace(
        blank,
        scale=scale,
        allowed=allowed.largest,
        agreement=agreement,
        own=allowed.own,
        formula=allowed.formula if allowed.formula < allowed.largest else None,
    )
    for tensor, whose in ((value, "the native model's values"), (reference, "the reference")):
        if bool(tensor.isnan().any()):
            return replace(blank, note=f"{int(tensor.isnan().sum())} NaN in {whose}")
    error = torch.where(value == reference, 0.0, (value - reference).abs())
    if bool(error.isinf().any()):
        return replace(blank, note=f"{int(error.isinf().sum())} values are infinite in one and not in the other")
    largest = float(error.max()) if error.numel() else 0.0
    mean = float(error.mean()) if error.numel() else 0.0
    note = DOUBTFUL if allowed.doubtful else blank.note
    return replace(blank, verdict=_verdict(largest, allowed), largest=largest, mean=mean, note=note)


def _verdict(largest: float, allowed: Allowed) -> Verdict:
    if largest <= allowed.formula:
        return Verdict.AGREES
    return Verdict.WITHIN_NOISE if largest <= allowed.largest else Verdict.DEPARTS


def _ids(
    blank: Comparison, value: torch.Tensor, reference: torch.Tensor, shortfall: torch.Tensor | None, expected:
    Expected, place: Place,
) -> Comparison:  # fmt: skip
    equal = value.to(torch.int64) == reference.to(torch.int64)
    agreement = float(equal.double().mean()) if equal.numel() else 1.0
    blank = replace(blank, agreement=agreement)
    if bool(equal.all()):
        return replace(blank, verdict=Verdict.AGREES)
    if shortfall is not None and bool(shortfall.isfinite().all()):
        worst, allowed = float(shortfall.max()), place.noise.allowance(place.depth, place.dtype, expected.dtype)
        note = f"the original's choice lies {worst:.1e} below the model's own"
        # Both candidates carry an error of their own.
        verdict = Verdict.TIED if worst <= 2 * allowed else Verdict.DEPARTS
        return replace(blank, verdict=verdict, allowed=allowed, note=note)
    first = (~equal).nonzero()[0].tolist()
    return replace(
        blank, note=f"first difference at {first}: {int(value[tuple(first)])}, not {int(reference[tuple(first)])}"
    )


def _same_length(
    value: torch.Tensor, reference: torch.Tensor, fill: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both padded to the longer of their last axes: hypotheses end where they end, whatever filled the rest."""
    length = max(value.shape[-1], reference.shape[-1])
    return _padded(value, length, fill), _padded(reference, length, fill)


def _padded(tensor: torch.Tensor, length: int, fill: float | None) -> torch.Tensor:
    filler = PAD_FILL if fill is None else fill
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=filler)


PAD_FILL = 1


def _shapes(value: torch.Tensor, reference: torch.Tensor) -> str:
    return f"the model gives the shape {list(value.shape)}, the original {list(reference.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
