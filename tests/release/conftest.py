"""The golden case cn-tiny of OFA, converted: a family that transformers has no class for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, running

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that speaks the Hub's protocol, in the place of the Hub; repetitions do not wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    with running() as server:
        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield server
        close_session()
