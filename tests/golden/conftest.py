"""Cases as fixtures: each is rebuilt and converted once a session, whatever tests ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_case import Case, find_cases, sources_of
from needs import FAMILIES, check_judged, chosen, has_released_vocabulary

from weightport.api import convert

OWN_CASES = Path(__file__).parent / "cases"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    elsewhere = metafunc.config.getoption("--golden")
    needs = [need for mark in metafunc.definition.iter_markers("judges") for need in mark.args]
    cases = chosen(find_cases(elsewhere or OWN_CASES), needs)
    if not elsewhere and has_released_vocabulary not in needs:
        check_judged(metafunc.definition.nodeid, cases)
    if cases:
        metafunc.parametrize("case", [pytest.param(case, id=case.name, marks=_marks(case)) for case in cases])
    else:
        without = pytest.mark.skip(
            reason=f"no case in {elsewhere or OWN_CASES.name} has what the test needs (--golden)"
        )
        metafunc.parametrize("case", [pytest.param(None, id="none", marks=without)])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a golden test that skips itself on the repository's own cases: what a case has decides before it runs."""
    report: pytest.TestReport = yield
    marked = any(item.iter_markers("skip"))
    if report.skipped and not marked and not hasattr(report, "wasxfail") and not item.config.getoption("--golden"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skips itself: state with @judges(…) what it needs of a case"
    return report


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if case.large else []


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """What a small machine has; results do not depend on it, times do."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def table(case: Case) -> ModuleType:
    """The table of the case's family."""
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
        table = FAMILIES[case.family]
        settings = {"vocabulary": vocabulary, **table.settings(case), **({"ema": True} if ema else {})}
        convert(sources_of(case, table, rebuilt(case)), out, case.family, **settings)
        return out

    return conversion
