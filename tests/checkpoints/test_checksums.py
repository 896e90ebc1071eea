"""The CRC-32 that a zip archive keeps of each member is compared when the member is used, once."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from weightport.checkpoints import Checkpoint, open_checkpoint
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError


def flip(path: Path, member: str, at: int) -> None:
    """Change one bit of a member's byte `at`, as a failing disk does."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    data = bytearray(path.read_bytes())
    header = info.header_offset
    start = header + 30 + int.from_bytes(data[header + 26 : header + 28], "little")
    start += int.from_bytes(data[header + 28 : header + 30], "little")
    data[start + at] ^= 1
    path.write_bytes(data)


def saved(folder: Path, value: object) -> Path:
    torch.save(value, folder / "c.pt")
    return folder / "c.pt"


@pytest.mark.parametrize("at", [0, 2000, 3999])
def test_a_damaged_weight_is_not_taken_for_a_weight(tmp_path, at: int):
    path = saved(tmp_path, {"w": torch.arange(1000.0), "good": torch.ones(3)})
    flip(path, "c/data/0", at)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"'c/data/0' is damaged: its CRC-32 should be \w{8} and is \w{8}"):
        checkpoint["w"].read()
    with pytest.raises(CheckpointError, match="'c/data/0' is damaged"):
        list(checkpoint["w"].pieces(64))
    assert checkpoint["good"].read().sum() == 3


def test_a_view_of_a_damaged_storage_is_refused_wherever_the_damage_is(tmp_path):
    whole = torch.arange(1000.0)
    path = saved(tmp_path, {"head": whole[:10], "tail": whole[990:], "strided": whole[::7]})
    flip(path, "c/data/0", 2000)
    for ref in open_checkpoint(path).values():
        with pytest.raises(CheckpointError, match="'c/data/0' is damaged"):
            ref.read()


@pytest.mark.parametrize("member", ["data.pkl", "byteorder"])
def test_damaged_descriptions_are_refused_at_opening(tmp_path, member: str):
    path = saved(tmp_path, {"w": torch.arange(3.0)})
    flip(path, f"c/{member}", 3)
    with pytest.raises(CheckpointError, match=f"'c/{member}' is damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_damaged_array_is_refused(tmp_path, write):
    write(tmp_path / "c.npz", w=np.arange(1000.0), text=np.array(["a", "b"]))
    flip(tmp_path / "c.npz", "w.npy", 300)
    with pytest.raises(CheckpointError, match=r"'w\.npy' (is damaged|unpacks to|cannot be decompressed)"):
        open_checkpoint(tmp_path / "c.npz")["w"].read()


def test_damage_in_an_arrays_header_that_leaves_it_readable_is_found_with_its_values(tmp_path):
    np.savez(tmp_path / "c.npz", w=np.arange(1000, dtype="<i4"))
    data = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(data.replace(b"'<i4'", b"'<f4'"))
    ref = open_checkpoint(tmp_path / "c.npz")["w"]
    with pytest.raises(CheckpointError, match=r"'w\.npy' is damaged"):
        list(ref.pieces(64))


def test_damaged_text_is_refused(tmp_path):
    np.savez(tmp_path / "c.npz", text=np.array(["a", "b"]))
    flip(tmp_path / "c.npz", "text.npy", 129)
    with pytest.raises(CheckpointError, match=r"c\.npz: 'text': 'text\.npy' is damaged"):
        open_checkpoint(tmp_path / "c.npz")


def read_bytes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each of the checkpoint's tensors cost to read."""
    counted: list[int] = []
    real = SourceFile.read_into

    def counting(self: SourceFile, buffer: memoryview, offset: int, what: str) -> None:
        counted[-1] += len(buffer)
        real(self, buffer, offset, what)

    monkeypatch.setattr(SourceFile, "read_into", counting)
    for ref in checkpoint.values():
        counted.append(0)
        ref.read()
    return counted


def test_a_storage_is_checked_once_and_whole_tensors_in_the_same_pass(tmp_path, monkeypatch):
    whole = torch.arange(1000.0)
    values = {"whole": torch.ones(1000), "head": whole[:10], "middle": whole[500:510], "again": whole}
    counted = read_bytes(open_checkpoint(saved(tmp_path, values)), monkeypatch)
    assert counted == [4000, 4000 + 40, 40, 4000]


def test_an_array_is_checked_in_the_pass_that_reads_it(tmp_path, monkeypatch):
    np.savez(tmp_path / "c.npz", w=np.arange(1000, dtype="<i4"))
    checkpoint = open_checkpoint(tmp_path / "c.npz")
    assert read_bytes(checkpoint, monkeypatch) == [4000 + 128]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_parts_in_their_order_cost_one_pass_and_are_checked_with_the_last(tmp_path, monkeypatch, write):
    values = np.random.default_rng(0).random((5, 2, 300_000)).astype(np.float32)
    write(tmp_path / "c.npz", w=values)
    ref, counted = open_checkpoint(tmp_path / "c.npz")["w"], [0]
    real = SourceFile.read_into

    def counting(self: SourceFile, buffer: memoryview, offset: int, what: str) -> None:
        counted[0] += len(buffer)
        real(self, buffer, offset, what)

    monkeypatch.setattr(SourceFile, "read_into", counting)
    for layer in range(5):
        for half in range(2):
            assert np.array_equal(ref.part(layer).part(half).read().numpy(), values[layer, half])
    assert counted[0] <= (tmp_path / "c.npz").stat().st_size


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (0, 2, 4), (1, 1, 0, 4)])
def test_parts_in_another_order_are_right_too(tmp_path, write, order: tuple[int, ...]):
    values = np.random.default_rng(0).random((5, 700_000)).astype(np.float32)
    write(tmp_path / "c.npz", w=values)
    ref = open_checkpoint(tmp_path / "c.npz")["w"]
    for place in order:
        assert np.array_equal(ref.part(place).read().numpy(), values[place])


def test_damage_is_found_with_the_last_of_the_parts(tmp_path):
    np.savez(tmp_path / "c.npz", w=np.arange(5000.0).reshape(5, 1000))
    flip(tmp_path / "c.npz", "w.npy", 9000)
    ref = open_checkpoint(tmp_path / "c.npz")["w"]
    with pytest.raises(CheckpointError, match=r"'w\.npy' is damaged"):
        [ref.part(place).read() for place in range(5)]
    with pytest.raises(CheckpointError, match=r"'w\.npy' is damaged"):
        open_checkpoint(tmp_path / "c.npz")["w"].part(3).read()


def test_an_archive_that_was_written_without_checksums_still_opens(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"w": torch.arange(5.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("c/data/0").CRC == 0
    assert open_checkpoint(path)["w"].read().tolist() == [0, 1, 2, 3, 4]
