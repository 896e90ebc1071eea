"""How fast a run goes: the samples of its steps, and the seconds that training took of them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pace:
    """Samples that steps process: all of them `per_step`, but for the last of an epoch, which takes what is left."""

    per_step: int
    per_epoch: int | None = None
    steps_per_epoch: int = 1

    @classmethod
    def of(cls, per_step: int, accumulation: int, dataloader: Any) -> Pace:
        """From the training data loader of one process; one without a length leaves epochs unknown."""
        try:
            batches, samples = len(dataloader), len(dataloader.dataset)
        except (TypeError, AttributeError):
            return cls(per_step)
        steps = max(1, math.ceil(batches / accumulation))
        return cls(per_step, min(samples, steps * per_step), steps)

    def samples(self, step: int) -> int:
        """Samples processed from the very beginning to the end of `step`."""
        if self.per_epoch is None:
            return step * self.per_step
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.per_epoch + rest * self.per_step


class Clock:
    """Seconds since the first step of this session, those of evaluations and checkpoints apart."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._step_ended = 0.0
        self._away = 0.0

    def begin(self) -> None:
        """A step begins. What came before the first, as skipping to where a run was left, costs no step anything."""
        if self._begun is None:
            self._begun = self._step_ended = time.monotonic()

    def worked(self) -> None:
        """A step or an epoch has ended."""
        self._step_ended = time.monotonic()

    def returned(self) -> None:
        """An evaluation or a checkpoint, begun when the last step ended, is done."""
        if self._begun is not None:
            now = time.monotonic()
            self._away += now - self._step_ended
            self._step_ended = now

    @property
    def elapsed(self) -> float:
        return 0.0 if self._begun is None else time.monotonic() - self._begun

    @property
    def training(self) -> float:
        return 0.0 if self._begun is None else max(0.0, self._step_ended - self._begun - self._away)
