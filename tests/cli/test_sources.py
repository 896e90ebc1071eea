"""What `port-ofa` makes of its source: a folder as its file, and of a file that changes, nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weightport.api import convert, export
from weightport.errors import CheckpointError


def without_times(folder: Path) -> dict[str, bytes]:
    """The bytes of every file; of the record of ownership, which holds times, names, sizes and SHA-256."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    owned = json.loads(found.pop(".weightport.json"))
    return found | {
        "owned": json.dumps({name: (size, digest) for name, (size, _, digest) in owned["files"].items()}).encode()
    }


def test_a_folder_with_one_checkpoint_gives_what_the_file_gives(port, spoiled, tmp_path):
    source = spoiled(lambda model: None)
    file, folder = tmp_path / "from-file", tmp_path / "from-folder"
    assert port(source, out=file).exit_code == 0
    result = port(source.parent, out=folder)
    assert result.exit_code == 0 and "no training options" not in result.output
    assert without_times(file) == without_times(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_trainers_checkpoint_keeps_its_options_beside_a_config(port, spoiled, tmp_path, name: str):
    source = spoiled(lambda model: None)
    file, folder = tmp_path / "from-file", tmp_path / "from-folder"
    assert port(source, out=file).exit_code == 0
    source.rename(source.with_name(name))
    (source.parent / "config.json").write_text('{"model_type": "ofa", "encoder_layers": 7}')
    assert port(source.parent, out=folder).exit_code == 0
    assert (file / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert json.loads((folder / "conversion.json").read_text())["layout"] == "fairseq"


def test_a_folder_with_several_checkpoints_asks_which(port, spoiled):
    source = spoiled(lambda model: None)
    (source.parent / "checkpoint_last.pt").write_bytes(source.read_bytes())
    result = port(source.parent)
    assert result.exit_code == 1
    assert "checkpoint_last.pt, model.pt" in result.stderr and "Name the one that you mean" in result.stderr


def test_a_layer_that_no_model_has_is_refused_at_once(port, spoiled):
    def add(model: dict[str, torch.Tensor]) -> None:
        model["encoder.layers.999999999.fc1.weight"] = torch.zeros(1)

    result = port(spoiled(add))
    assert result.exit_code == 1
    assert "encoder.layers.999999999.fc1.weight would be of layer 999999999" in result.stderr


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    os.replace(path.with_name("new"), path)


def after(count: int, change: Callable[[Path], None], path: Path) -> Callable[[int], None]:
    """An `advance` that changes the file once `count` chunks are written."""
    calls = 0

    def advance(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            change(path)

    return advance


@pytest.mark.parametrize("change", [shrink, write_in_place, replace])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_source_that_changes_while_it_is_converted_is_refused(spoiled, tmp_path, change, when: str):
    source = spoiled(lambda model: None)
    chunks: list[int] = []
    convert(source, tmp_path / "whole", advance=chunks.append)
    count = 1 if when == "first" else len(chunks)
    with pytest.raises(CheckpointError, match=r"model\.pt: changed while it was read"):
        convert(source, tmp_path / "target" / "out", advance=after(count, change, source))
    assert not (tmp_path / "target").exists() or not os.listdir(tmp_path / "target")


def test_a_damaged_weight_is_not_converted(port, spoiled, tmp_path):
    source = spoiled(lambda model: model.update({"encoder.layer_norm.weight": torch.full((64,), 0.77)}))
    data = source.read_bytes()
    at = data.index(torch.full((64,), 0.77).numpy().tobytes()) + 100
    source.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    result = port(source)
    assert result.exit_code == 1 and "is damaged: its CRC-32 should be" in result.stderr
    assert not (tmp_path / "target" / "out").exists()


@pytest.mark.parametrize("change", [shrink, write_in_place])
def test_a_model_that_changes_while_it_is_exported_is_refused(checkpoint, tmp_path, change):
    convert(checkpoint, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
        export(tmp_path / "model", tmp_path / "target" / "back.pt", advance=after(1, change, weights))
    assert not (tmp_path / "target").exists() or not os.listdir(tmp_path / "target")
