"""The benchmarks start: what they import of the package is still there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("script", ["convert.py", "convert_blip2.py", "merge.py", "finetune.py"])
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
