"""Opening a checkpoint, whatever its format: recognised by its first bytes, never by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from weightport.checkpoints.formats.hub_folder import open_folder
from weightport.checkpoints.formats.npz import open_npz
from weightport.checkpoints.formats.safetensors_file import MAX_HEADER, open_safetensors
from weightport.checkpoints.formats.sharded import open_sharded
from weightport.checkpoints.formats.torch_files import is_legacy, open_legacy, open_zip
from weightport.checkpoints.formats.trainer_folder import is_trainer_folder, open_trainer_folder
from weightport.checkpoints.formats.zip_archive import read_directory
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.checkpoints.types import Checkpoint
from weightport.errors import CheckpointError

_LOOK = 512

# First bytes of what users hand over instead of a checkpoint, and what to do about each.
_NOT_CHECKPOINTS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a Git LFS pointer, a text that stands for the real file. Run `git lfs pull` in its folder, or download "
        "the file with `hf download`.",
    ),
    (
        (b"<!doctype html", b"<html", b"<?xml", b"<head"),
        "is a web page, so the download answered with an error or log-in page. Open it in a browser to see why, and "
        "download the file itself.",
    ),
    ((b"GGUF",), "is a GGUF file of llama.cpp. Convert from the checkpoint that it was made from."),
    ((b"\x89HDF\r\n",), "is an HDF5 file, as Keras writes. Convert from the PyTorch or safetensors weights."),
    ((b"\x93NUMPY",), "is a single NumPy array (.npy). A checkpoint is an .npz file of named arrays."),
    (
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"),
        "is compressed. Unpack it first.",
    ),
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the checkpoint at `path`: a file, the index of a sharded one, a folder with weights and config.json, or a
    folder of big_vision's trainers.

    Reads names, shapes and metadata only, so that it takes no longer for more bytes. Nothing in the file is executed
    or imported. Formats: torch archives (.pt, .pth, .bin, .ckpt), torch's format before 1.6, safetensors,
    shards of these with their index, .npz, and folders of zarr arrays.

    Raises CheckpointError for what is missing, damaged or of another format, and UnsafeCheckpointError for a file that
    only executing it could read, or that would execute commands.
    """
    place = Path(path)
    if os.path.isdir(place):
        return open_trainer_folder(place) if is_trainer_folder(place) else open_folder(place, open_file)
    return open_file(place)


def open_file(path: Path) -> Checkpoint:
    """The checkpoint in one file, or in the shards that the index file `path` names."""
    file = SourceFile(path)
    start = file.read(0, min(_LOOK, file.size), "the file's beginning")
    for recognise, reader in _FORMATS:
        if recognise(start):
            return reader(file)
    if start.lstrip().startswith((b"{", b"[")):
        return open_sharded(path, _open_shard)
    raise CheckpointError(f"{path}: {_reason(start, file.size)}")


def _open_shard(path: Path) -> Checkpoint:
    file = SourceFile(path)
    start = file.read(0, min(_LOOK, file.size), "the file's beginning")
    if start.lstrip().startswith(b"{"):
        raise CheckpointError(f"{path}: should be a shard with weights, but is JSON.")
    return open_file(path)


def _open_archive(file: SourceFile) -> Checkpoint:
    members = read_directory(file)
    if any(name.endswith("/data.pkl") for name in members):
        return open_zip(file, members)
    if members and all(name.endswith(".npy") for name in members):
        return open_npz(file, members)
    raise CheckpointError(
        f"{file.path}: is a zip archive, but neither torch.save's (it has no data.pkl) nor NumPy's (.npy members); it "
        f"holds {shown(tuple(members)) if members else 'nothing'}. If a checkpoint is packed in it, unpack it first."
    )


def _looks_like_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[SourceFile], Checkpoint]], ...] = (
    (lambda start: start.startswith((b"PK\3\4", b"PK\5\6")), _open_archive),
    (is_legacy, open_legacy),
    (_looks_like_safetensors, open_safetensors),
)


def _reason(start: bytes, size: int) -> str:
    """Why a file with these first bytes is no checkpoint."""
    text = start.lstrip().lower()
    for beginnings, reason in _NOT_CHECKPOINTS:
        if start.startswith(beginnings) or text.startswith(beginnings):
            return reason
    if start[257:262] == b"ustar":
        return "is a tar archive. Unpack it; torch's own tar format of before 0.1.10 must be saved again with torch."
    if start[:1] == b"\x80" and start[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5"):
        return "is a plain pickle, not a checkpoint by torch.save. Save its weights as safetensors where you trust it."
    if start.isascii() and start.decode("ascii").isprintable():
        return f"is not a checkpoint: its {size} bytes begin with the text {shown(start, 80)}. Download it again."
    return (
        "is of no known format: neither a torch checkpoint, safetensors nor .npz. It begins with the bytes "
        f"{start[:16].hex(' ')}; it may be truncated or damaged."
    )
