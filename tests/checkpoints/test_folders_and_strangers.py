"""Folders, shards and their index; and what people hand over instead of a checkpoint."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightport.checkpoints import open_checkpoint
from weightport.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def shards(folder: Path, weight_map: dict[str, Any] | None = None, suffix: str = "safetensors") -> Path:
    names = [f"model-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    save = save_file if suffix == "safetensors" else torch.save
    save({"b": torch.zeros(2), "a": torch.ones(1)}, folder / names[0])
    save({"c": torch.full((3,), 2.0)}, folder / names[1])
    index = folder / (INDEX if suffix == "safetensors" else "pytorch_model.bin.index.json")
    weight_map = weight_map or {"a": names[0], "b": names[0], "c": names[1]}
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_open_by_their_index_or_their_folder(tmp_path, suffix):
    index = shards(tmp_path, suffix=suffix)
    (tmp_path / "config.json").write_text('{"model_type": "florence2"}')
    for path in (index, tmp_path):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == path and checkpoint.folder == tmp_path
        assert set(checkpoint) == {"a", "b", "c"}
        assert checkpoint["c"].read().tolist() == [2.0] * 3
        assert [file.name for file in checkpoint.files] == [
            index.name,
            f"model-00001-of-00002.{suffix}",
            f"model-00002-of-00002.{suffix}",
        ]
        assert checkpoint.format == ("safetensors-sharded" if suffix == "safetensors" else "torch-sharded")
    assert checkpoint.document["config"] == {"model_type": "florence2"}
    assert checkpoint.document["weights"]["metadata"] == {"total_size": 24}


def test_the_links_of_the_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir(), snapshot.mkdir()
    shards(blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{number:x}")
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / f"{number:x}")
    assert set(open_checkpoint(snapshot)) == {"a", "b", "c"}


SHARD = "model-00001-of-00002.safetensors"
BAD_MAPS: dict[str, tuple[Any, str]] = {
    "parent": ({"a": "../secret.safetensors"}, "beside the index"),
    "absolute": ({"a": "/etc/passwd"}, "beside the index"),
    "windows": ({"a": "..\\secret"}, "beside the index"),
    "drive": ({"a": "C:secret"}, "beside the index"),
    "subfolder": ({"a": "sub/x.safetensors"}, "beside the index"),
    "dots": ({"a": ".."}, "beside the index"),
    "empty": ({"a": ""}, "beside the index"),
    "nul": ({"a": "a\0b"}, "beside the index"),
    "number": ({"a": 5}, "beside the index"),
    "shard missing": ({"a": SHARD, "d": "model-00003-of-00003.safetensors"}, "not beside it"),
    "tensor missing": ({"a": SHARD, "b": SHARD, "x": SHARD}, "lacks 1 tensors.*'x'"),
    "tensor surplus": ({"a": SHARD}, "also holds 1 tensors.*'b'"),
    "the index itself": ({"a": INDEX}, "is JSON"),
    "no map": ([], "no weight_map"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path, name):
    weight_map, message = BAD_MAPS[name]
    index = shards(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as one"),
        ("[1, 2]", "it has no weight_map"),
        ('"text"', "is not a checkpoint"),
        ("{}", "it has no weight_map"),
        ("[" * 100_000, "it nests too deep"),
        ('{"weight_map": {}}', "it has no weight_map"),
    ],
)
def test_json_that_is_no_index_is_refused(tmp_path, text, said):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"model\.json: .*{said}"):
        open_checkpoint(tmp_path / "model.json")


def test_a_folder_prefers_safetensors_to_pickles_and_conventional_names_to_others(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"o": torch.zeros(1)}, tmp_path / "optimizer.bin")
    assert open_checkpoint(tmp_path).files == (tmp_path / "pytorch_model.bin",)
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert open_checkpoint(tmp_path).files == (tmp_path / "pytorch_model.bin",)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).files == (tmp_path / "model.safetensors",)
    shards(tmp_path)
    assert open_checkpoint(tmp_path).files[0] == tmp_path / INDEX


def test_an_index_left_over_from_before_the_weights_were_saved_as_one_file_is_ignored(tmp_path):
    shards(tmp_path)
    (tmp_path / SHARD).unlink()
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).files == (tmp_path / "model.safetensors",)


def test_the_only_weights_of_a_folder_are_taken_whatever_their_name(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "ofa_cn.pt")
    torch.save({}, tmp_path / "training_args.bin")
    (tmp_path / "vocab.txt").write_text("a")
    checkpoint = open_checkpoint(tmp_path)
    alone = open_checkpoint(tmp_path / "ofa_cn.pt")
    assert checkpoint.path == alone.path and list(checkpoint) == ["model.w"]
    assert checkpoint.document.keys() == alone.document.keys() == {"model"}
    torch.save({"w": torch.zeros(1)}, tmp_path / "second.pth")
    with pytest.raises(CheckpointError, match=r"ofa_cn\.pt, second\.pth"):
        open_checkpoint(tmp_path)


def test_malformed_companions_are_named(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"config\.json: should be a JSON file"):
        open_checkpoint(tmp_path)


def test_folders_without_weights_say_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights.*empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights.*config\.json"):
        open_checkpoint(tmp_path)
    shards(tmp_path).unlink()
    with pytest.raises(CheckpointError, match="without their index"):
        open_checkpoint(tmp_path)


STRANGERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    "web page after a line": (b"\n  <html>", "web page"),
    "storage error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "text": (b"Entry not found", "Entry not found"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "gzip": (gzip.compress(b"x"), "compressed"),
    "plain pickle": (pickle.dumps({"w": [1.0]}), "plain pickle"),
    "noise": (bytes(range(128, 200)), "no known format"),
    "zeros": (bytes(1000), "no known format"),
    "short": (b"P", "text|known format"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_files_that_are_no_checkpoints_are_explained(tmp_path, name):
    data, message = STRANGERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "model.safetensors" in str(caught.value)


def test_packed_checkpoints_are_explained(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "inner.pt")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / "inner.pt", "folder/inner.pt")
    with tarfile.open(tmp_path / "packed.tar", "w") as archive:
        archive.add(tmp_path / "inner.pt", "inner.pt")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, message in (("packed.zip", "unpack"), ("packed.tar", "Unpack"), ("array.npy", "single NumPy array")):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


def test_missing_and_unreadable_paths_are_named(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path / "file.txt" / "x", tmp_path / "a\0b", tmp_path / ("n" * 300)):
        (tmp_path / "file.txt").write_text("x")
        with pytest.raises(CheckpointError, match="expected a checkpoint"):
            open_checkpoint(path)
    (tmp_path / "dangling.pt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is a link to nowhere"):
        open_checkpoint(tmp_path / "dangling.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="expected a file"):
        open_checkpoint(tmp_path / "pipe.pt")
    shards(tmp_path, {"a": "pipe.pt"})
    with pytest.raises(CheckpointError, match="expected a file"):
        open_checkpoint(tmp_path / INDEX)


def test_the_extension_does_not_matter(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(str(tmp_path / "model.safetensors")).format == "torch-zip"
    save_file({"w": torch.zeros(1)}, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").format == "safetensors"
