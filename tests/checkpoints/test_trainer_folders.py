"""Steps that big_vision's trainers write. The folder `trainer_folder` was written by JAX 0.10.2's array serialization,
as big_vision calls it, on a mesh of 2 × 2 devices, two arrays with odd chunks by tensorstore 0.1.86; expected.npz has
what was written."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from weightport.checkpoints import open_checkpoint
from weightport.errors import CheckpointError

WRITTEN = Path(__file__).parent / "trainer_folder"
STEP = "checkpoint.bv-000000020"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what the trainer left."""
    return shutil.copytree(WRITTEN, tmp_path / "work")


def expected() -> dict[str, torch.Tensor]:
    found = {}
    for name, array in np.load(WRITTEN / "expected.npz").items():
        raw = array.dtype.kind == "V"
        array = array.view(np.int16) if raw else array
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        found[name] = tensor.view(torch.bfloat16) if raw else tensor
    return found


def test_every_array_is_read_as_the_trainer_wrote_it_whatever_its_chunks_are() -> None:
    checkpoint = open_checkpoint(WRITTEN / STEP)
    wanted = expected()
    assert set(checkpoint) == set(wanted) and checkpoint.format == "zarr-folder"
    for name, tensor in wanted.items():
        found = checkpoint[name].read()
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert torch.equal(torch.cat(list(checkpoint[name].pieces(8))), tensor.reshape(-1)), name
        for place in range(len(tensor) if tensor.ndim else 0):
            assert torch.equal(checkpoint[name].rows(place, place + 1)[0], tensor[place]), name


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_layers_of_an_array_are_read_one_by_one(order: int) -> None:
    checkpoint = open_checkpoint(WRITTEN)
    for name, tensor in expected().items():
        if tensor.ndim == 3:
            for place in range(len(tensor))[::order]:
                assert torch.equal(checkpoint[name].part(place).read(), tensor[place]), name
                assert torch.equal(checkpoint[name].part(place).part(1).read(), tensor[place, 1]), name


def test_training_state_is_listed_and_its_files_are_not_the_models() -> None:
    checkpoint = open_checkpoint(WRITTEN / STEP)
    assert "opt/1/rows" in checkpoint and "chrono/accum_train_time" in checkpoint
    assert {file.parent.name.partition("~")[0] for file in checkpoint.files} == {"params"}


def test_newest_finished_step_is_chosen_and_named(folder: Path) -> None:
    for name in ("checkpoint.bv-000000010", "checkpoint.bv-000000030", "checkpoint.bv-000000025-tmp"):
        shutil.copytree(folder / STEP, folder / name)
    checkpoint = open_checkpoint(folder)
    # 30 is newer than what the trainer says it finished.
    assert checkpoint.path.name == STEP and checkpoint.document == {"step": STEP}
    with pytest.raises(CheckpointError, match=r"000000030: is not finished: .* is 000000020\. Name that one"):
        open_checkpoint(folder / "checkpoint.bv-000000030")
    (folder / "checkpoint.bv-LAST").unlink()
    assert open_checkpoint(folder).path.name == "checkpoint.bv-000000030"


def test_temporary_step_is_refused_by_name(folder: Path) -> None:
    (folder / STEP).rename(folder / f"{STEP}-tmp")
    with pytest.raises(CheckpointError, match=r"000000020-tmp: is a temporary step, which the trainer deletes"):
        open_checkpoint(folder / f"{STEP}-tmp")
    with pytest.raises(CheckpointError, match=r"no step that is finished and stays; there are \S+-tmp \(temporary\)"):
        open_checkpoint(folder)
    (folder / "checkpoint.bv-LAST").write_text("000000020-tmp")
    with pytest.raises(CheckpointError, match=r"newest finished step: give the folder a name without -tmp"):
        open_checkpoint(folder / f"{STEP}-tmp")


@pytest.mark.parametrize(("array", "chunk"), [("params~rows", "1.0"), ("params~zeros", "0.0"), ("opt~0", "0")])
def test_missing_chunk_is_refused(folder: Path, array: str, chunk: str) -> None:
    (folder / STEP / array / chunk).unlink()
    with pytest.raises(CheckpointError, match=rf"{array}: lacks 1 of its \d chunks"):
        open_checkpoint(folder)


def test_missing_metadata_is_refused(folder: Path) -> None:
    (folder / STEP / "params~rows" / ".zarray").unlink()
    with pytest.raises(CheckpointError, match=r"params~rows has no \.zarray"):
        open_checkpoint(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"\0" * len(data), lambda data: data[:5]])
def test_damaged_chunk_is_refused_when_it_is_read(folder: Path, damage) -> None:
    path = folder / STEP / "params~inner" / "0.1.1"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"params~inner/0\.1\.1: (cannot be unpacked|ends at byte)"):
        open_checkpoint(folder)["params/inner"].read()


def test_chunk_of_another_size_is_refused(folder: Path) -> None:
    shutil.copy(folder / STEP / "params~whole" / "0.0", folder / STEP / "params~rows" / "0.0")
    with pytest.raises(CheckpointError, match=r"params~rows/0\.0: unpacks to more than its 24 bytes"):
        open_checkpoint(folder)["params/rows"].read()


def test_chunk_that_was_written_to_since_the_opening_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = folder / STEP / "params~rows" / "0.0"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint["params/rows"].read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zarr_format": 3}, "zarr_format is '3'"),
        ({"order": "F"}, "order is .*F"),
        ({"compressor": {"id": "blosc"}}, "compressor is .*blosc"),
        ({"filters": [{"id": "delta"}]}, "filters is"),
        ({"dtype": "|O"}, r"dtype '\|O', which has no equal in torch"),
        ({"dtype": [["a", "<f4"]]}, "which has no equal in torch"),
        ({"shape": [4, -3]}, "shape should be a list of whole numbers"),
        ({"chunks": [0, 3]}, "chunks should be a list of whole numbers"),
        ({"chunks": [2]}, r"shape \[4, 3\], but chunks of \[2\]"),
        ({"shape": [10**11, 3]}, "lacks .* chunks"),
    ],
)
def test_other_arrays_than_trainers_write_are_refused_with_what_differs(folder: Path, change, said: str) -> None:
    path = folder / STEP / "params~rows" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


def test_package_that_is_missing_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest):
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    ref = open_checkpoint(WRITTEN)["params/whole"]
    with pytest.raises(CheckpointError, match=r"zstandard.*pip install '\.\[zarr\]'"):
        ref.read()


def test_one_array_of_a_step_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="is one array of a trainer's checkpoint"):
        open_checkpoint(WRITTEN / STEP / "params~rows")


def test_orbaxs_newer_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.ocdbt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="checkpoint of Orbax"):
        open_checkpoint(tmp_path)
