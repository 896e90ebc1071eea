"""The golden case cn-tiny of OFA, converted: a family that transformers has no class for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from weightport.api import convert

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(GOLDEN))
    import golden

    source = golden.materialize(GOLDEN / "cases" / "ofa" / "cn-tiny", tmp_path_factory.mktemp("original"))
    out = tmp_path_factory.mktemp("converted") / "ofa"
    convert(source, out, "ofa")
    return out


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A copy of the converted directory, to be spoiled."""
    return Path(shutil.copytree(converted, tmp_path / "model"))
