"""Bad samples: the first one ends the run, or up to a number of them are skipped and counted."""

from __future__ import annotations

from weightport.errors import DataError

SHOWN = 5


class Faults:
    """Collects what is wrong while a data set is opened and raises DataError once it is more than `allowed`."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.skipped: list[str] = []

    def add(self, fault: DataError) -> None:
        self.skipped.append(str(fault))
        if len(self.skipped) <= self.allowed:
            return
        if not self.allowed:
            raise DataError(f"{fault}\n  Mend it, or let bad samples be left out with --skip-bad N.") from fault
        lines = "".join(f"\n  {reason}" for reason in self.skipped[:SHOWN])
        more = len(self.skipped) - SHOWN
        raise DataError(
            f"More bad samples than the {self.allowed} that --skip-bad allows:{lines}"
            + (f"\n  and {more} more before the reading stopped" if more > 0 else "")
        ) from fault
