#!/usr/bin/env python3
"""Golden cases: original checkpoints of any size, kept in a few kilobytes, with the original implementation's outputs.

A case is a folder:

    case.json              how to rebuild the original checkpoint file, and where the reference came from
    skeleton.zip           (torch checkpoints) the pickle exactly as the original code wrote it, without tensor bytes
    stored.npz             the few tensors that no formula gives (index buffers)
    companions/...         the text files that stand beside the checkpoint (config.json, dict.txt, ...)
    reference.safetensors  inputs and outputs of the ORIGINAL implementation on exactly these weights

No weight is stored: every tensor is a pure function of its name, shape and dtype (`fill`), so the original
implementation and the port can be given identical weights at any size without either shipping them.

    golden.py materialize CASE OUT     write the original checkpoint and its companions to the folder OUT

Needs numpy; torch only to materialize bfloat16 tensors. Runs on Python 3.8 and later.
"""

import io
import json
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

_CHUNK = 1 << 22


def fill_bounds(name, shape):
    """The range a tensor's values are drawn from: (low, high), chosen so that activations keep their scale."""
    leaf = name.rsplit(".", 1)[-1].rsplit("/", 1)[-1]
    if leaf == "running_var":
        return 0.5, 1.5
    if len(shape) >= 2:
        # torch puts inputs last ([out, in, *kernel]); flax 'kernel' puts outputs last ([*kernel, in, out]).
        fan_in = np.prod(shape[:-1]) if leaf == "kernel" else np.prod(shape[1:])
        bound = float(np.sqrt(3.0 / max(int(fan_in), 1)))
        return -bound, bound
    if leaf in ("bias", "running_mean", "beta") or leaf.endswith("_bias"):
        return -0.1, 0.1
    return 0.5, 1.5


def fill(name, shape, dtype="float32"):
    """Values of the tensor `name`: numpy array of `shape`, float32 (float64 and float16 on request).

    Counter-based: element i is splitmix64(crc32(name) * 2**32 + i), its top 24 bits scaled into fill_bounds.
    """
    low, high = fill_bounds(name, tuple(shape))
    count = int(np.prod(shape)) if len(shape) else 1
    out = np.empty(count, dtype=np.float32)
    base = np.uint64(zlib.crc32(name.encode("utf-8")) << 32)
    with np.errstate(over="ignore"):
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            z = np.arange(start, stop, dtype=np.uint64) + base
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            unit = (z >> np.uint64(40)).astype(np.float64) * 2.0**-24
            out[start:stop] = (low + (high - low) * unit).astype(np.float32)
    return out.reshape(tuple(shape)).astype(dtype, copy=False)


def raw_bytes(name, shape, dtype):
    """Little-endian bytes of the tensor `name` in `dtype` (a torch dtype's name without 'torch.')."""
    values = fill(name, shape)
    if dtype == "bfloat16":
        import torch

        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return values.astype(dtype).tobytes()


def _stored(case):
    path = case / "stored.npz"
    return np.load(path) if path.exists() else {}


def _tensor_bytes(entry, stored):
    if entry.get("stored"):
        return np.ascontiguousarray(stored[entry["stored"]]).tobytes()
    return raw_bytes(entry["fill"], entry["shape"], entry["dtype"])


def _materialize_torch_zip(case, spec, target):
    """A torch.save archive: the skeleton's records in order, each storage's bytes regenerated, 64-byte aligned."""
    stored = _stored(case)
    with zipfile.ZipFile(case / "skeleton.zip") as skeleton, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for name in spec["records"]:
            storage = spec["storages"].get(name)
            data = skeleton.read(name) if storage is None else _tensor_bytes(storage, stored)
            info = zipfile.ZipInfo(name)
            header = 30 + len(name.encode())
            pad = -(out.fp.tell() + header + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, pad) + b"Z" * pad
            out.writestr(info, data)


_ST = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_SIZE = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def _materialize_safetensors(case, spec, target):
    stored = _stored(case)
    header, offset = {}, 0
    for name, entry in spec["tensors"].items():
        size = int(np.prod(entry["shape"], dtype=np.int64)) * _SIZE[entry["dtype"]]
        header[name] = {"dtype": _ST[entry["dtype"]], "shape": entry["shape"], "data_offsets": [offset, offset + size]}
        offset += size
    if spec.get("metadata"):
        header["__metadata__"] = spec["metadata"]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for entry in spec["tensors"].values():
            out.write(_tensor_bytes(entry, stored))


def _materialize_npz(case, spec, target):
    stored = _stored(case)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as out:
        for name, entry in spec["tensors"].items():
            buffer = io.BytesIO()
            dtype = entry["dtype"]
            if entry.get("stored"):  # noqa: SIM108
                array = stored[entry["stored"]]
            else:
                array = fill(entry["fill"], entry["shape"], dtype)
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            out.writestr(zipfile.ZipInfo(name + ".npy"), buffer.getvalue())


_WRITERS = {"torch-zip": _materialize_torch_zip, "safetensors": _materialize_safetensors, "npz": _materialize_npz}


def materialize(case, out):
    """Write every file of the case's original checkpoint to the folder `out`.

    Returns the path of the (first) checkpoint file, or of `out` for a case that has none (tokenizer, preprocessing).
    """
    case, out = Path(case), Path(out)
    spec = json.loads((case / "case.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    companions = case / "companions"
    if companions.is_dir():
        for source in sorted(companions.rglob("*")):
            if source.is_file():
                target = out / source.relative_to(companions)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
    paths = []
    for checkpoint in spec.get("checkpoints", []):
        target = out / checkpoint["file"]
        _WRITERS[checkpoint["format"]](case, checkpoint, target)
        paths.append(target)
    return paths[0] if paths else out


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "materialize":
        sys.exit(__doc__)
    print(materialize(sys.argv[2], sys.argv[3]))
