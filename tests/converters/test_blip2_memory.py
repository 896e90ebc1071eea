"""BLIP-2 at OPT-2.7b's widths, converted and held against LAVIS in a process of little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from blip2_checkpoints import CASES, blip2_cases
from golden_case import Case

LIMIT = 4 << 30
"""Bytes of private memory. The three sources have 1.5 GB, the model 0.5 billion parameters; its weights count as
private where they are mapped to be run."""

PROGRAM = """
import json, sys
from weightport.api import check_parity, convert

sources, out, reference, settings = sys.argv[1:]
convert(json.loads(sources), out, "blip2", **json.loads(settings))
report = check_parity(out, reference)
worst = {}
for each in report.comparisons:
    if each.seam in ("logits", "qformer"):
        name = f"{each.seam}, {each.dtype} against {each.against}"
        worst[name] = max(worst.get(name, 0), each.largest)
print(json.dumps({"passed": report.passed, "verdict": report.verdict, "largest": worst, "notes": list(report.notes),
                  "missed": [each.reason for each in report.not_compared]}))
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


@pytest.mark.slow
def test_released_widths_are_converted_and_proven_in_4_gb(tmp_path: Path) -> None:
    case = Case(CASES / "opt2.7b-width", "opt2.7b-width")
    sources = blip2_cases.sources(case, case.materialize(tmp_path / "original"))
    reference = blip2_cases.write_case(case, tmp_path / "reference.safetensors", kinds=("forward", "generate"))
    given = json.dumps({name: str(path) for name, path in sources.items()})
    settings = json.dumps(blip2_cases.settings(case))
    command = [sys.executable, "-c", PROGRAM, given, str(tmp_path / "out"), str(reference), settings]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    print(found)
    assert found["passed"] and not found["missed"], found
    assert found["largest"]["logits, float32 against float32"] <= 1e-5
    assert found["largest"]["logits, float64 against float64"] <= 1e-13
