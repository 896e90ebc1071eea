"""BLIP-2 at OPT-2.7b's widths, converted and held against LAVIS in processes of little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blip2_checkpoints import CASES, blip2_cases
from golden_case import Case

LIMIT = 4 << 30
"""Bytes of private memory. The model has 0.5 billion parameters, which take 2 GB in float32; the embedding alone takes
1 GB in float64 where it gives the logits, and a search in float64 takes more than is left."""

CONVERT = """
import json, resource, sys
from weightport.api import convert

sources, out, settings = sys.argv[1:]
convert(json.loads(sources), out, "blip2", **json.loads(settings))
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""
COMPARE = """
import json, sys, torch
from weightport.api import check_parity

out, reference, dtype = sys.argv[1:]
report = check_parity(out, reference, dtypes=[getattr(torch, dtype)])
logits = [each.largest for each in report.comparisons if each.seam == "logits"]
print(json.dumps({"passed": report.passed, "verdict": report.verdict, "logits": logits,
                  "missed": [each.reason for each in report.not_compared]}))
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def ran(program: str, *words: object) -> dict[str, Any]:
    command = [sys.executable, "-c", program, *map(str, words)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.slow
def test_released_widths_are_converted_and_proven_in_4_gb(tmp_path: Path) -> None:
    case = Case(CASES / "opt2.7b-width", "opt2.7b-width")
    sources = blip2_cases.sources(case, case.materialize(tmp_path / "original"))
    given = json.dumps({name: str(path) for name, path in sources.items()})
    converted = ran(CONVERT, given, tmp_path / "out", json.dumps(blip2_cases.settings(case)))
    # The largest tensor, OPT's embedding, has 257 MB.
    assert converted["peak"] < 1 << 30
    for dtype, kinds, bound in (("float32", ("forward", "generate"), 1e-5), ("float64", ("forward",), 1e-13)):
        reference = blip2_cases.write_case(case, tmp_path / f"{dtype}.safetensors", kinds=kinds)
        found = ran(COMPARE, tmp_path / "out", reference, dtype)
        assert found["passed"] and not found["missed"], found
        assert min(found["logits"]) <= bound, found
