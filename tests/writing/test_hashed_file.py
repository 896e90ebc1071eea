"""The file that large outputs are streamed into: its bytes, its hash, and a disk that fails on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import random

import pytest

from weightport.writing import HashedFile, hashed_file


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "BLOCK_BYTES", 8192)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8192, 8193, 100_003, 81_920])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_pieces_of_any_size_come_out_in_order_and_hashed(size, direct, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr(hashed_file, "_DIRECT", 0)
    content = random.Random(size).randbytes(size)
    cuts = sorted(random.Random(1).choices(range(size + 1), k=7))
    with HashedFile(tmp_path / "file") as out:
        for start, stop in zip([0, *cuts], [*cuts, size]):
            out.write(memoryview(content)[start:stop])
    assert (tmp_path / "file").read_bytes() == content
    assert (out.size, out.sha256) == (size, hashlib.sha256(content).hexdigest())


@pytest.mark.usefixtures("small_blocks")
def test_buffer_may_be_used_again_once_it_is_written(tmp_path):
    buffer = bytearray(1000)
    with HashedFile(tmp_path / "file") as out:
        for number in range(256):
            buffer[:] = bytes([number]) * 1000
            out.write(memoryview(buffer))
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * 1000 for number in range(256))


@pytest.mark.usefixtures("small_blocks")
def test_disk_that_refuses_direct_writes_is_written_to_anyway(tmp_path, monkeypatch):
    write, refused = os.write, []

    def fussy(descriptor, data):
        if not refused and len(data) >= 4096:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data[:5000])  # and it takes less than it is given

    monkeypatch.setattr(hashed_file.os, "write", fussy)
    content = os.urandom(50_000)
    with HashedFile(tmp_path / "file") as out:
        out.write(content)
    assert refused and (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("pieces", [1, 100])
@pytest.mark.usefixtures("small_blocks")
def test_disk_that_fills_up_is_an_error_and_no_short_file_passes(pieces, tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hashed_file.os, "write", full)
    with pytest.raises(OSError, match="No space left"), HashedFile(tmp_path / "file") as out:
        for _ in range(pieces):
            out.write(bytes(10_000))


def test_error_of_the_block_itself_is_the_one_that_is_raised(tmp_path):
    with pytest.raises(KeyboardInterrupt), HashedFile(tmp_path / "file") as out:
        out.write(b"some")
        raise KeyboardInterrupt
