"""A converted model and its reference, from a golden case that every option is on in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "golden"))

import ofa_cases
from golden_case import Case
from reference_subsets import subset

from weightport.api import convert
from weightport.parity import check

CASE = Case(Path(__file__).parents[1] / "golden/cases/ofa/cn-tiny", "cn-tiny")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The case's native directory."""
    out = tmp_path_factory.mktemp("parity") / "native"
    convert(CASE.materialize(out.parent / "original"), out, "ofa", vocabulary="none")
    return out


@pytest.fixture(scope="session")
def whole_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the case holds, as a reference file."""
    return ofa_cases.write_case(CASE, tmp_path_factory.mktemp("reference") / "reference.safetensors")


@pytest.fixture
def reference(whole_reference: Path, tmp_path: Path) -> Callable[..., Path]:
    """A reference of some runs: `reference("text")`; `change(runs, tensors, slices)` may edit them before writing."""

    return subset(whole_reference, tmp_path / "some.safetensors")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.nn.Module], None]], None]:
    """Make every model that parity loads carry a mistake."""

    def planted(mistake: Callable[[torch.nn.Module], None]) -> None:
        load = check.load_native

        def load_with_mistake(*args, **kwargs):
            model = load(*args, **kwargs)
            with torch.no_grad():
                mistake(model)
            return model

        monkeypatch.setattr(check, "load_native", load_with_mistake)

    return planted
