"""Cases as fixtures: each is rebuilt and converted once a session, whatever tests ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import florence2_cases
import ofa_cases
import pytest
import torch
from golden_case import Case, find_cases

from weightport.api import convert

OWN_CASES = Path(__file__).parent / "cases"
FAMILIES = {table.FAMILY: table for table in (ofa_cases, florence2_cases)}
"""Families whose cases can be judged, and the table that brings their references into the product's format."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden") or OWN_CASES
    metafunc.parametrize("case", [pytest.param(case, id=case.name, marks=_marks(case)) for case in find_cases(folder)])


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if case.large else []


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """What a small machine has; results do not depend on it, times do."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def table(case: Case):
    """The family's table; skips a case of a family that has none."""
    if case.family not in FAMILIES:
        pytest.skip(f"the family {case.family!r} is not ported")
    return FAMILIES[case.family]


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The original's checkpoint of a case, rebuilt."""

    @cache
    def rebuild(case: Case) -> Path:
        return case.materialize(tmp_path_factory.mktemp("original"))

    return rebuild


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, rebuilt: Callable[[Case], Path]) -> Callable[..., Path]:
    """The native directory of a case, converted as `port-<family>` does."""

    @cache
    def conversion(case: Case, ema: bool = False) -> Path:
        out = tmp_path_factory.mktemp("native") / "model"
        vocabulary = None if (case.path / "companions").is_dir() else "none"
        convert(rebuilt(case), out, case.family, vocabulary=vocabulary, ema=ema)
        return out

    return conversion
