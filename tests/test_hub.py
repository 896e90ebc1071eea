"""A Hub that is not there: every command that takes a Hub id says so at once, and no secret appears."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from weightport import hub
from weightport.errors import VocabularyError
from weightport.families.florence2.tokenizer import read_florence2_vocabulary
from weightport.tokenizers.sources import read_ofa_vocabulary


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a port that nobody listens at, as the Hub's."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    close_session()
    for name in ("ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setattr(constants, name, address, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return address


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every wait; huggingface_hub's five before its repetitions take 23 seconds."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


@pytest.mark.parametrize("read", [read_ofa_vocabulary, read_florence2_vocabulary])
def test_vocabulary_of_a_hub_that_is_not_there_fails_at_once(
    read: Callable[[str], Any], nobody: str, slept: list[float]
) -> None:
    with pytest.raises(VocabularyError, match=f"no answer from {nobody} ") as found:
        read("someone/vocabulary")
    assert not slept
    assert "\n" not in str(found.value).partition("Expected")[0].strip()


def test_data_set_of_a_hub_that_is_not_there_fails_at_once(
    nobody: str, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    from weightport.errors import DataError
    from weightport.finetuning.data import DataSettings, open_data

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for settings in (DataSettings(), DataSettings(split="train")):
        with pytest.raises(DataError, match=f"someone/data is no file or folder here.*no answer from {nobody} "):
            open_data("someone/data", settings)
    assert not slept and datasets.config.HF_HUB_OFFLINE is False


def test_file_in_the_cache_is_used_when_the_hub_is_not_there(nobody: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--someone--vocabulary" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.txt").write_text("狗\n")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert hub.download("someone/vocabulary", "vocab.txt").read_text() == "狗\n"


def test_secrets_are_taken_out_of_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: "my own secret")
    text = "Bearer my own secret at https://me:pass@host/x?token=hf_AbCdEfGhIjKlMnOpQr"
    assert hub.without_secrets(text) == "Bearer <token> at https://host/x?token=<token>"


def test_reason_of_a_failed_thread_names_the_cause() -> None:
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = ConnectionResetError("Connection reset by peer\nand more")
    assert hub.reason(error) == "Error while uploading 'model.safetensors' to the Hub: Connection reset by peer"
