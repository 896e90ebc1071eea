"""A small fairseq checkpoint, as OFA's own trainer wrote it, and ways to spoil it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from weightport import cli

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASE = GOLDEN / "cases" / "ofa" / "cn-tiny"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case cn-tiny, rebuilt with its vocabulary beside it."""
    sys.path.insert(0, str(GOLDEN))
    import golden

    return golden.materialize(CASE, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="session")
def document(checkpoint: Path) -> dict[str, Any]:
    """What torch loads from it: our own file, so it may be loaded as its trainer would."""
    return torch.load(checkpoint, weights_only=False)


@pytest.fixture
def spoiled(tmp_path: Path, checkpoint: Path, document: dict[str, Any]) -> Callable[..., Path]:
    """Writes a copy of the checkpoint whose model tensors `change` has altered, with the vocabulary beside it."""

    def write(change: Callable[[dict[str, torch.Tensor]], Any], **sections: Any) -> Path:
        model = dict(document["model"])
        change(model)
        folder = tmp_path / "spoiled"
        folder.mkdir()
        torch.save({"args": None, "cfg": document["cfg"], "model": model, **sections}, folder / "model.pt")
        for name in ("dict.txt", "vocab.txt"):
            (folder / name).write_bytes((checkpoint.parent / name).read_bytes())
        return folder / "model.pt"

    return write


@pytest.fixture
def port(tmp_path: Path) -> Callable[..., Result]:
    """`port-ofa SOURCE OUT …`, run in this process; OUT is below tmp_path/out."""

    def run(source: Path | str, *options: str, out: Path | None = None) -> Result:
        return CliRunner().invoke(cli.port_ofa, [str(source), str(out or tmp_path / "target" / "out"), *options])

    return run
