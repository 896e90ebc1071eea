"""The widths of a released PaliGemma 2 3B, converted and held against big_vision in a process of little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from paligemma2_checkpoints import CASES, golden

sys.path.insert(0, str(Path(golden.__file__).parent))
import paligemma2_cases
from golden_case import Case

LIMIT = 4 << 30
"""Bytes of private memory. The embedding alone has 2.4 GB in float32; the model has 3.3 GB, which count as private
where they are mapped to be run."""

PROGRAM = """
import json, sys
from weightport.api import check_parity, convert

source, out, reference = sys.argv[1:]
convert(source, out, vocabulary="none")
report = check_parity(out, reference)
worst = {}
for each in report.comparisons:
    if each.seam == "logits":
        worst[f"{each.dtype} against {each.against}"] = each.largest
print(json.dumps({"passed": report.passed, "verdict": report.verdict, "logits": worst,
                  "missed": [each.reason for each in report.not_compared]}))
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


@pytest.mark.slow
def test_released_widths_are_converted_and_proven_in_4_gb(tmp_path: Path) -> None:
    case = Case(CASES / "wide-3b-2layers", "wide-3b-2layers")
    source = case.materialize(tmp_path / "original")
    reference = paligemma2_cases.write_case(case, tmp_path / "reference.safetensors")
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out"), str(reference)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    print(found)
    assert found["passed"] and not found["missed"], found
    assert found["logits"]["float32 against float32"] <= 3e-5
