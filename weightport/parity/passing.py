"""Departures on the way that nothing later shows: reported as such, and no verdict on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from weightport.parity.compare import Comparison, Verdict


def mark_passing(
    comparisons: Sequence[Comparison], order: Sequence[str], is_outcome: Callable[[str], bool]
) -> list[Comparison]:
    """The comparisons, with `PASSING` for each departure on the way after which all seams of its run agree.

    A run's precisions and attention implementations are judged together: what float32 hides at the logits, float64
    shows. Another shape, NaN, an infinity or other ids are no error that later seams could absorb.
    """
    place = {seam: i for i, seam in enumerate(order)}
    by_run: dict[str, list[Comparison]] = {}
    for each in comparisons:
        by_run.setdefault(each.run, []).append(each)
    absorbed = {run for run, rows in by_run.items() if _absorbs(rows, place, is_outcome)}
    return [
        replace(each, verdict=Verdict.PASSING) if each.run in absorbed and not each.verdict.passes else each
        for each in comparisons
    ]


def _absorbs(rows: Sequence[Comparison], place: dict[str, int], is_outcome: Callable[[str], bool]) -> bool:
    """Whether what departs in a run are errors on the way, and every precision has an outcome that agrees."""
    wrong = [each for each in rows if not each.verdict.passes]
    if not wrong or any(each.largest is None or is_outcome(each.seam) for each in wrong):
        return False
    last = max(place.get(each.seam, len(place)) for each in wrong)
    later = [each for each in rows if place.get(each.seam, len(place)) > last and is_outcome(each.seam)]
    return {each.dtype for each in wrong} <= {each.dtype for each in later}
