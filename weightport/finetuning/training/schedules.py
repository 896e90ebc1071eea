"""Learning rate schedules that transformers does not have, by names that `training.lr_scheduler_type` takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from weightport.errors import RecipeError

PROGRESS_COSINE = "progress_cosine"


@dataclass(frozen=True)
class ProgressCosine:
    """A linear warm-up and a cosine over a run's progress, as moondream's notebook computes them.

    An optimizer step's rate is that of the share of steps taken before it, from 0 at the first. (transformers'
    `cosine_warmup_with_min_lr` counts the warm-up from 0 and the cosine from 1.) Fields are shares of the learning
    rate: `warmup_lr_rate` at the first step, `min_lr_rate` where the cosine ends; `cosine_share` is how much of its
    half wave the run goes through.
    """

    min_lr_rate: float = 0.0
    warmup_lr_rate: float = 0.0
    cosine_share: float = 1.0

    def rate(self, step: int, *, steps: int, warmup: float) -> float:
        """The share of the learning rate that optimizer step number `step` of `steps` is taken with; the first is 0.
        `warmup` is the warm-up's share of the steps."""
        progress = step / max(1, steps)
        if progress < warmup:
            return self.warmup_lr_rate + (1 - self.warmup_lr_rate) * progress / warmup
        passed = min(1.0, (progress - warmup) / max(1 - warmup, 1e-12))
        height = (1 + math.cos(math.pi * self.cosine_share * passed)) / 2
        return self.min_lr_rate + (1 - self.min_lr_rate) * height

    def over(self, steps: int, warmup_steps: float) -> Callable[[int], float]:
        """`rate` of a run of `steps`. `warmup_steps` as transformers has it: a share of the steps below 1, else their
        number."""
        share = warmup_steps if warmup_steps < 1 else warmup_steps / max(1, steps)
        return partial(self.rate, steps=steps, warmup=share)


def own_schedule(training: Mapping[str, Any]) -> ProgressCosine | None:
    """The schedule that `training` names, None where it is transformers'. Raises RecipeError."""
    if training.get("lr_scheduler_type") != PROGRESS_COSINE:
        return None
    settings = training.get("lr_scheduler_kwargs") or {}
    known = [each.name for each in fields(ProgressCosine)]
    if not isinstance(settings, Mapping) or set(settings) - set(known):
        raise RecipeError(
            f"training.lr_scheduler_kwargs of {PROGRESS_COSINE} are {', '.join(known)}, not {settings!r}."
        )
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise RecipeError(f"training.lr_scheduler_kwargs.{name} is {value!r}; it is a number from 0 to 1.")
    return ProgressCosine(**settings)
