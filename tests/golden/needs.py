"""What golden tests need of a case: `@judges(need, …)` runs a test on the cases that have all of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import blip2_cases
import florence2_cases
import moondream2_cases
import ofa_cases
import paligemma2_cases
import pytest
from golden_case import Case

FAMILIES: dict[str, ModuleType] = {
    table.FAMILY: table for table in (ofa_cases, florence2_cases, paligemma2_cases, blip2_cases, moondream2_cases)
}
"""Families whose cases can be judged, and the table that brings their references into the product's format."""

Need = Callable[[Case], Any]
"""Whether a case has something: true or false, or what it has."""


def judges(*needs: Need) -> pytest.MarkDecorator:
    """Marks a test of the `case` fixture: it judges the cases that meet every need."""
    return pytest.mark.judges.with_args(*needs)


def chosen(cases: Sequence[Case], needs: Sequence[Need]) -> list[Case]:
    """The cases that meet every need."""
    return [case for case in cases if all(need(case) for need in needs)]


def check_judged(test: str, cases: Sequence[Case]) -> None:
    """Raises pytest's CollectError for a golden test that would run on none of these cases in an ordinary run."""
    if all(case.large for case in cases):
        raise pytest.Collector.CollectError(
            f"{test} runs on none of the repository's own golden cases{': all are large' if cases else ''}. "
            "Give it a small case that has what it needs."
        )


def has_released_vocabulary(case: Case) -> bool:
    """A third party's data file, which is no part of this repository: such tests run with `--golden` alone."""
    return (case.path / "companions" / "tokenizer.json").is_file() and not case.checkpoints


def of_family(name: str) -> Need:
    return lambda case: case.family == name


def has_data(file: str) -> Need:
    """The JSON file `file` stands in the case."""
    return lambda case: (case.path / file).is_file()


def has_checkpoint(case: Case) -> bool:
    return case.family in FAMILIES and bool(case.checkpoints)


def is_of_the_model_alone(case: Case) -> bool:
    """Its reference is that of the checkpoint, not of an adapter on it."""
    return has_checkpoint(case) and not case.adapter


def has_averaged_weights(case: Case) -> bool:
    return has_checkpoint(case) and FAMILIES[case.family].has_ema(case)


def generates(case: Case) -> bool:
    return is_of_the_model_alone(case) and any(FAMILIES[case.family].is_generated(name) for name in case.tensor_names)


def has_portable_adapter(case: Case) -> bool:
    return has_checkpoint(case) and bool(case.adapter) and "expected" not in case.spec


def has_adapter_training(case: Case) -> bool:
    """Logits, loss and gradients of the whole batch with the adapter beside the base."""
    return has_portable_adapter(case) and "training" in case.spec


def has_adapter_to_refuse(case: Case) -> bool:
    return has_checkpoint(case) and bool(case.adapter) and "expected" in case.spec


def strings(case: Case) -> dict[str, Any] | None:
    """The strings of an OFA case and their ids; those of a case beside it where it says so."""
    own = case.data("tokenization.json")
    beside = re.search(r"\S+/tokenization\.json", str(case.spec.get("reference", {}).get("tokenizer", "")))
    return own or (case.data(f"../{beside[0]}") if beside else None)
