"""A file cut anywhere, or with any byte changed, is opened or refused in words, and never does anything else."""

from __future__ import annotations

import argparse
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_bytes import storage_id, tensor, write_archive
from safetensors.torch import save_file

from weightport.checkpoints import open_checkpoint, plain
from weightport.errors import CheckpointError

VALUE = {"args": argparse.Namespace(lr=0.1), "w": torch.arange(6.0).reshape(2, 3), "h": torch.ones(2).half()}


def torch_zip(path: Path) -> None:
    torch.save(VALUE, path)


def torch_legacy(path: Path) -> None:
    torch.save(VALUE, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path) -> None:
    save_file({"w": VALUE["w"], "h": VALUE["h"]}, path, metadata={"format": "pt"})


def npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, w=np.arange(6.0).reshape(2, 3), h=np.ones(2, "V2"))


def npz_compressed(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, w=np.arange(6.0).reshape(2, 3))


WRITERS = [torch_zip, torch_legacy, safetensors, npz, npz_compressed]
Writer = Callable[[Path], None]


def use(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for ref in checkpoint.values():
        found = ref.read()
        assert found.dtype == ref.dtype and found.shape == ref.shape
    plain(checkpoint.document)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_cut_at_any_byte_is_refused(tmp_path, writer: Writer):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    writer(whole)
    use(whole)
    data = whole.read_bytes()
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut"):
            open_checkpoint(cut)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path, writer: Writer):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    writer(whole)
    data = whole.read_bytes()
    generator = random.Random(0)
    refused = 0
    for position in range(len(data)):
        for value in {
            data[position] ^ 1 << generator.randrange(8),
            generator.choice((0, 255, 127, generator.randrange(256))),
        }:
            changed.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                use(changed)
            except CheckpointError:
                refused += 1
    assert refused > len(data) // 10


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_with_bytes_removed_or_doubled_is_read_or_refused(tmp_path, writer: Writer):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    writer(whole)
    data = whole.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        first, last = sorted(generator.choices(range(len(data)), k=2))
        part = generator.choice((b"", data[first:last] * 2, bytes(last - first), generator.randbytes(last - first)))
        changed.write_bytes(data[:first] + part + data[last:])
        try:
            use(changed)
        except CheckpointError:
            continue


DOCUMENT = {"w": tensor(storage_id(), 0, (12,), (1,))}


@pytest.fixture
def archive(tmp_path) -> Path:
    return write_archive(tmp_path / "c.pt", DOCUMENT, {"0": bytes(48)})


def rewritten(path: Path, change: Callable[[bytearray, int, int], None]) -> Path:
    """The archive with `change(data, local header, central entry)` of the storage's member applied."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as opened:
        local = opened.getinfo("archive/data/0").header_offset
    central = data.index(b"archive/data/0", data.index(b"PK\1\2")) - 46
    change(data, local, central)
    path.write_bytes(data)
    return path


def sets(form: str, local: int | None, central: int | None, value: int) -> Callable[[bytearray, int, int], None]:
    def change(data: bytearray, local_at: int, central_at: int) -> None:
        for base, offset in ((local_at, local), (central_at, central)):
            if offset is not None:
                struct.pack_into(form, data, base + offset, value)

    return change


DISAGREE = r"directory and the header of 'archive/data/0' at byte \d+ disagree"
TAMPERED = {
    "encrypted": (sets("<H", 6, 8, 1), "is encrypted"),
    "encrypted in the local header only": (sets("<H", 6, None, 1), "is encrypted"),
    "another name in the local header": (sets("<H", 32, None, 0x4141), DISAGREE),
    "longer name in the local header": (sets("<H", 26, None, 15), DISAGREE),
    "another size in the local header": (sets("<L", 22, None, 44), DISAGREE),
    "another size in both": (sets("<L", 22, 24, 44), "is stored, yet 48 bytes are said to make 44"),
    "size of gigabytes": (sets("<L", None, 24, 1 << 31), "is stored, yet 48 bytes are said to make 2147483648"),
    "compressed size of gigabytes": (
        sets("<L", None, 20, 1 << 31), "is stored, yet 2147483648 bytes are said to make 48",
    ),
    "compression unknown": (sets("<H", 8, 10, 99), r"is compressed \(method 99\)"),
    "compression in one header only": (sets("<H", None, 10, 8), DISAGREE),
    "header beyond the file": (sets("<L", None, 42, 1 << 31), "should be 30 bytes at byte 2147483648, but the file"),
    "header of another member": (sets("<L", None, 42, 0), DISAGREE),
    "zip64 without its field": (sets("<L", None, 24, 0xFFFFFFFF), "has no zip64 sizes"),
    "on another disk": (sets("<H", None, 34, 1), "is one part of a split zip archive"),
    "extra field beyond the end": (sets("<H", None, 30, 0xFFFF), "zip directory ends inside an entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_archive_is_refused(archive, name):
    open_checkpoint(archive)["w"].read()
    change, said = TAMPERED[name]
    with pytest.raises(CheckpointError, match=rf"c\.pt: .*{said}"):
        open_checkpoint(rewritten(archive, change))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_stands_twice_is_refused(archive):
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("archive/data/0", bytes(48))
    with pytest.raises(CheckpointError, match="two members"):
        open_checkpoint(archive)


def test_overlapping_members_are_refused(tmp_path):
    # A whole member, header and all, among the bytes of another: the way of zip bombs.
    inner = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, zlib.crc32(bytes(4)), 4, 4, 14, 0)
    inner += b"archive/data/1" + bytes(4)
    path = write_archive(tmp_path / "c.pt", DOCUMENT, {"0": inner})
    data = path.read_bytes()
    start, end, within = data.index(b"PK\1\2"), data.index(b"PK\5\6"), data.index(inner)
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, zlib.crc32(bytes(4)), 4, 4, 14, 0, 0, 0, 0, 0, within
    )
    count, length = struct.unpack_from("<H", data, end + 8)[0] + 1, end - start + len(entry) + 14
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, start, 0)
    path.write_bytes(data[:end] + entry + b"archive/data/1" + tail)
    with zipfile.ZipFile(path) as opened:
        assert opened.read("archive/data/1") == bytes(4), "the archive is sound but for the overlap"
    with pytest.raises(CheckpointError, match=r"'archive/data/0' overlaps what follows it"):
        open_checkpoint(path)


def test_bytes_before_or_after_an_archive_are_refused(archive):
    data = archive.read_bytes()
    after, before = "has bytes after the end", r"should end at byte \d+ and ends at \d+: bytes were added or lost"
    for changed, said in ((data + b"x", after), (data[:4] + b"x" + data[4:], before), (b"PK\3\4" + data, before)):
        archive.write_bytes(changed)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(archive)


def test_an_archive_with_a_comment_opens(archive):
    with zipfile.ZipFile(archive, "a") as opened:
        opened.comment = b"released"
    assert open_checkpoint(archive)["w"].numel == 12


def test_a_zip64_archive_opens(tmp_path):
    path = tmp_path / "c.pt"
    source = write_archive(tmp_path / "source.pt", DOCUMENT, {"0": np.arange(12, dtype="<f4").tobytes()})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as member:
                member.write(old.read(name))
    data = bytearray(path.read_bytes())
    end = data.index(b"PK\5\6")
    _, _, _, _, count, length, start, _ = struct.unpack_from("<4s4H2LH", data, end)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:end] + record + locator + tail)
    assert open_checkpoint(path)["w"].read().tolist() == list(range(12))


def test_a_pickle_in_two_places_or_none_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a/data.pkl", b"N.")
        opened.writestr("b/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match=r"one data\.pkl"):
        open_checkpoint(path)
