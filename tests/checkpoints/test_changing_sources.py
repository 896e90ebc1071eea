"""A source that somebody writes to while it is read gives an error: never a mix of two versions, never a crash."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightport.checkpoints import open_checkpoint
from weightport.errors import CheckpointError
from weightport.hashing import BackgroundDigests

VALUES = {"a": torch.arange(100_000.0), "b": torch.ones(100_000)}


def torch_zip(folder: Path) -> Path:
    torch.save(VALUES, folder / "c.pt")
    return folder / "c.pt"


def torch_legacy(folder: Path) -> Path:
    torch.save(VALUES, folder / "c.pt", _use_new_zipfile_serialization=False)
    return folder / "c.pt"


def safetensors(folder: Path) -> Path:
    save_file(VALUES, folder / "c.safetensors")
    return folder / "c.safetensors"


def sharded(folder: Path) -> Path:
    save_file(VALUES, folder / "m-1.safetensors")
    names = ", ".join(f'"{name}": "m-1.safetensors"' for name in VALUES)
    (folder / "m.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
    return folder / "m.safetensors.index.json"


def npz(folder: Path) -> Path:
    np.savez(folder / "c.npz", **{name: value.numpy() for name, value in VALUES.items()})
    return folder / "c.npz"


def npz_compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "c.npz", a=np.random.default_rng(0).random(600_000, np.float32), b=np.ones(9))
    return folder / "c.npz"


FORMATS = [torch_zip, torch_legacy, safetensors, sharded, npz, npz_compressed]
Form = Callable[[Path], Path]


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")


def write_in_place_and_restore_the_time(path: Path) -> None:
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [shrink, write_in_place, write_in_place_and_restore_the_time]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMATS)
def test_no_tensor_is_read_from_a_file_that_changed_since_it_was_opened(tmp_path, form: Form, change):
    checkpoint = open_checkpoint(form(tmp_path))
    change(checkpoint.files[-1])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint["a"].read()


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_changes_between_two_pieces_of_a_tensor_is_refused(tmp_path, form: Form):
    checkpoint = open_checkpoint(form(tmp_path))
    pieces = checkpoint["a"].pieces(4096)
    next(pieces)
    shrink(checkpoint.files[-1])
    with pytest.raises(CheckpointError, match=r"changed while it was read: it has shrunk from \d+ to \d+ bytes"):
        list(pieces)


@pytest.mark.parametrize("form", FORMATS)
def test_pieces_are_the_tensor_and_bounded(tmp_path, form: Form):
    ref = open_checkpoint(form(tmp_path))["a"]
    pieces = list(ref.pieces(4096))
    assert torch.equal(torch.cat(pieces), ref.read())
    assert max(piece.nbytes for piece in pieces) == 4096


def test_digests_are_refused_when_the_file_was_written_to_while_it_was_hashed(tmp_path, monkeypatch):
    path = safetensors(tmp_path)
    digests = BackgroundDigests([path])
    monkeypatch.setattr("weightport.hashing.BLOCK_BYTES", 4096)
    with digests:
        digests._thread.join()
        write_in_place(path)
        with pytest.raises(CheckpointError, match=r"changed while it was read: it was written to"):
            digests.result()


def test_digests_of_another_file_than_was_opened_are_refused(tmp_path):
    path = safetensors(tmp_path)
    checkpoint = open_checkpoint(path)
    save_file({"a": torch.zeros(100_000), "b": torch.ones(100_000)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with BackgroundDigests(checkpoint.files) as digests:
        assert digests.result()
        with pytest.raises(CheckpointError, match="another file has taken its place"):
            digests.result(checkpoint.states)


def test_hashing_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(bytes(1 << 20))
    monkeypatch.setattr("weightport.hashing.BLOCK_BYTES", 4096)
    digests = BackgroundDigests([path])
    reading = digests._stop.is_set

    def shrink_once() -> bool:
        if path.stat().st_size > 4096:
            os.truncate(path, 4096)
        return reading()

    monkeypatch.setattr(digests._stop, "is_set", shrink_once)
    with digests, pytest.raises(CheckpointError, match="shrunk from 1048576 to 4096 bytes"):
        digests.result()


def test_a_file_that_the_disk_cannot_read_is_named(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(safetensors(tmp_path))

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: a tensor at byte \d+ cannot be read \(Input/output"):
        checkpoint["a"].read()


def test_open_files_are_closed_with_the_checkpoint(tmp_path):
    path = safetensors(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limit[0]), limit[1]))
    try:
        for _ in range(300):
            open_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
