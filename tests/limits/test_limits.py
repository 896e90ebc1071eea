"""The largest inputs that weightport promises to take, in processes of 2 GB: `make limits`.

Files are sparse, so that the disk holds their headers only; what is written is real, and as large as
WEIGHTPORT_LIMITS_GB (4 by default) allows. Each test prints what it took.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sparse_files
import torch
from limited import DISK, Done, python, weightport

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import paligemma_files

pytestmark = pytest.mark.slow

INSPECTION = 2.0
"""Seconds of processor time that `inspect` may take, whatever the bytes of its source."""

OF_MANY = 4.0
"""The same for 100,000 headers."""

PLAN_OF_A_MERGE = """
import sys
from weightport.api import merge_lora
class Planned(Exception): pass
def announce(plan):
    print(plan.nbytes, len(plan.shards), sum(out.edit is not None for outs in plan.shards.values() for out in outs))
    raise Planned
try:
    merge_lora(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3], announce=announce)
except Planned:
    pass
"""


def shown(what: str, done: Done) -> None:
    print(f"\n{what}: {done}")


def inspected(path: Path, *expected: str, within: float = INSPECTION) -> None:
    done = weightport("inspect", path)
    shown(f"inspect {path.name}", done)
    assert done.status == 0, done.output[-2000:]
    for text in expected:
        assert text in done.output, done.output[:2000]
    assert done.processor < within


def test_a_28b_npz_is_inspected_planned_in_full_and_converted_as_far_as_the_disk_allows(tmp_path: Path) -> None:
    whole = tmp_path / "28b.npz"
    total = paligemma_files.write_sparse(whole, paligemma_files.shapes("28b"))
    assert total > 55e9
    inspected(whole, "55.3 GB", "27.7 B values")
    planned = weightport("convert", whole, tmp_path / "none", "--family", "paligemma2", "--vocab", "none", "--dry-run")
    shown("plan of 55.3 GB", planned)
    assert planned.status == 0, planned.output[-2000:]
    part = tmp_path / "part.npz"
    one = paligemma_files.write_sparse(part, paligemma_files.shapes("28b", 1))
    layers = max(
        1, 1 + int((DISK - one) // (paligemma_files.write_sparse(part, paligemma_files.shapes("28b", 2)) - one))
    )
    size = paligemma_files.write_sparse(part, paligemma_files.shapes("28b", layers))
    done = weightport("convert", part, tmp_path / "out", "--family", "paligemma2", "--vocab", "none", "--quiet")
    shown(f"conversion of {size / 1e9:.1f} GB, {layers} text layers of 46", done)
    assert done.status == 0, done.output[-2000:]
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) >= size


def test_a_70b_sharded_merge_is_planned_in_full_and_run_as_far_as_the_disk_allows(tmp_path: Path) -> None:
    total = sparse_files.write_llama(tmp_path / "base", 80)
    sparse_files.write_adapter(tmp_path / "adapter", 80)
    assert total > 141e9
    inspected(tmp_path / "base", "141 GB", "70.6 B values")
    planned = python(PLAN_OF_A_MERGE, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    shown(f"plan of a merge into {total / 1e9:.0f} GB", planned)
    assert planned.status == 0, planned.output[-2000:]
    nbytes, shards, changed = map(int, planned.output.split()[-3:])
    assert nbytes > 141e9 and shards == 31 and changed == 160
    refused = weightport("merge-lora", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--no-verify")
    assert refused.status == 1 and "are needed. Nothing was written" in refused.output, refused.output[-2000:]
    size = sparse_files.write_llama(tmp_path / "part", 1, rows=16_000)
    sparse_files.write_adapter(tmp_path / "small", 1)
    done = weightport(
        "merge-lora", tmp_path / "part", tmp_path / "small", tmp_path / "merged", "--no-verify", "--quiet"
    )
    shown(f"merge into {size / 1e9:.1f} GB of the same widths", done)
    assert done.status == 0, done.output[-2000:]
    checked = weightport("verify", tmp_path / "merged")
    shown("verify it", checked)
    assert checked.status == 0, checked.output[-2000:]


def test_a_27_gb_training_checkpoint_is_inspected_planned_in_full_and_converted(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    model = sparse_files.write_training_checkpoint(path, 73)
    assert path.stat().st_size > 27e9 and path.stat().st_blocks * 512 < 100e6
    inspected(path, "OFA")
    planned = weightport("convert", path, tmp_path / "none", "--family", "ofa", "--vocab", "none", "--dry-run")
    shown(f"plan of {path.stat().st_size / 1e9:.1f} GB, of which {model / 1e9:.1f} GB are the model", planned)
    assert planned.status == 0, planned.output[-2000:]
    sparse_files.write_training_checkpoint(path, 12)
    done = weightport("convert", path, tmp_path / "out", "--family", "ofa", "--vocab", "none", "--quiet")
    shown(f"conversion of a {path.stat().st_size / 1e9:.1f} GB checkpoint of 12 layers a side", done)
    assert done.status == 0, done.output[-2000:]


def test_100_000_tensors_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    sparse_files.write_safetensors(path, {f"layers.{n}.weight": (64, 64) for n in range(100_000)})
    inspected(path, "100000 tensors", within=OF_MANY)
    done = weightport("inspect", path, "--tensors")
    shown("inspect --tensors", done)
    assert done.status == 0 and "layers.99999.weight" in done.output


def test_10_000_shards(tmp_path: Path) -> None:
    sparse_files.write_sharded(tmp_path / "shards", {f"layers.{n}.weight": (64, 64) for n in range(10_000)}, 1)
    inspected(tmp_path / "shards", "10000 tensors", within=OF_MANY)


def test_names_of_4_kb_are_taken_and_longer_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.safetensors"
    sparse_files.write_safetensors(path, {f"{n:04d}" + "x" * 4092: (64, 64) for n in range(10_000)})
    inspected(path, "10000 tensors", within=OF_MANY)
    sparse_files.write_safetensors(path, {"x" * 4097: (1,)}, torch.float32)
    done = weightport("inspect", path)
    assert done.status == 1 and "4096" in done.output.replace(",", ""), done.output
