"""The benchmarks start, and run in a tiny size: what they import of the package is still there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
from processes import Figures, Timing, load, save, timed  # noqa: E402

SCRIPTS = sorted({benchmark.script for benchmark in bench.BENCHMARKS.values()} | {"bench.py", "data_loading.py"})
# Each costs a few seconds of processor time; the others load models and peft several times over.
CHEAP = ("importing", "reading-data")


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_says_how_it_is_run(script: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.slow
def test_finetuning_benchmark_runs_whole_at_tiny_size() -> None:
    """What --gpu does at full size, with the golden case as it is, on whatever machine this is."""
    script = [sys.executable, BENCHMARKS / "finetune.py", "--tiny", "--runs", "1", "--only"]
    done = subprocess.run(
        [*script, "florence2-full", "florence2", "--trainers", "ours"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    whole, frozen = (line for line in done.stdout.splitlines() if line.startswith("  ours"))
    for line in (whole, frozen):
        assert "samples/s" in line and "TFLOP/s" in line and "of what a matrix product reaches" in line, line
    assert "nothing frozen" in done.stdout and "vision and projector frozen" in done.stdout


def run_tiny(name: str, folder: Path) -> str:
    """Its rows of the page."""
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--tiny", "--runs", "1", "--only", name]
    done = subprocess.run(
        [*command, "--folder", str(folder)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_benchmark_runs_tiny(name: str, tmp_path: Path) -> None:
    assert "| " in run_tiny(name, tmp_path).partition("|---")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bench.BENCHMARKS if name not in CHEAP])
def test_benchmark_runs_tiny(name: str, tmp_path: Path) -> None:
    page = run_tiny(name, tmp_path)
    helped = bench.BENCHMARKS[name].tiny == ("--help",)
    assert helped or "| " in page.partition("|---")[2]


def test_tiny_runs_leave_the_results_alone(tmp_path: Path) -> None:
    before = bench.RESULTS.read_bytes() if bench.RESULTS.is_file() else b""
    run_tiny("converting-blip2", tmp_path)
    assert (bench.RESULTS.read_bytes() if bench.RESULTS.is_file() else b"") == before


def test_page_has_ratios_to_the_peer_and_to_copying() -> None:
    rows = {
        "ours": Timing(3.0, 200, 250),
        "peer": Timing(6.0, 1000, 1100),
        "cp": Timing(0.5, 1),
        "start": Timing(1, 5),
    }
    figures = {"title": "Merging", "ours": "ours", "peer": "peer", "copy": "cp", "start": "start"}
    entry = {
        "figures": [{**figures, "rows": {name: vars(row) for name, row in rows.items()}}],
        "machine": "2 cores", "date": "2026-01-01", "load": "0",
    }  # fmt: skip
    page = bench.page({"merging": entry})
    assert "| Merging: ours | 3.00 s | peer, 6.00 s | 2.00 | 4.0 | 200 | 1000 | 250 | 1100 |" in page
    assert "- 2 cores: merging (2026-01-01, load 0)" in page


def test_figures_survive_a_file(tmp_path: Path) -> None:
    figures = Figures.of("x", {"a": [Timing(1, 2, 3), Timing(3, 4, 5), Timing(2, 9, 4)], "b": []}, "a", "b")
    assert figures.rows == {"a": Timing(2, 4, 4)}
    save(tmp_path / "figures.json", [figures])
    assert load(tmp_path / "figures.json") == [figures]


def test_private_memory_and_unique_set_are_sampled() -> None:
    holding = "import time; held = bytearray(80 << 20); time.sleep(0.4)"
    found = timed([sys.executable, "-c", holding])
    assert 80 < found.megabytes < 130
    assert found.megabytes * 0.9 < found.unique < found.megabytes + 60
