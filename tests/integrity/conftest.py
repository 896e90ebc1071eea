"""A converted Florence-2 of tiny size: a family of transformers, with a processor."""

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

    source = golden.materialize(GOLDEN / "cases" / "florence2" / "tiny-main", tmp_path_factory.mktemp("original"))
    out = tmp_path_factory.mktemp("converted") / "florence2"
    convert(source.parent, out, "florence2")
    return out


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A copy of the converted directory, to be spoiled."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def foreign(model: Path) -> Path:
    """The same without a record of any kind: what a repository of somebody else's holds."""
    (model / ".weightport.json").unlink()
    (model / "conversion.json").unlink()
    return model
