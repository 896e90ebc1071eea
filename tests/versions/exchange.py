"""Directories that one environment writes and another loads: `exchange.py write|read FOLDER`.

`write` converts the smallest golden case of every family and puts the original's reference beside it; `read` verifies
each directory that it finds and holds the loaded model against that reference. Prints one JSON object: errors by case.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = (
    "ofa/cn-tiny",
    "florence2/tiny-main",
    "paligemma2/tiny-gemma2",
    "blip2/opt-tiny",
    "moondream2/tiny-2024-08-26",
)
REFERENCE = "reference.safetensors"


def write(folder: Path) -> dict[str, str]:
    """A directory and a reference for every case."""
    from golden_case import Case, sources_of
    from needs import FAMILIES

    from weightport.api import convert

    errors = {}
    for name in CASES:
        case = Case(GOLDEN / "cases" / name, name)
        table = FAMILIES[case.family]
        place = folder / name.replace("/", "-")
        place.mkdir(parents=True)
        try:
            with tempfile.TemporaryDirectory() as original:
                sources = sources_of(case, table, case.materialize(Path(original)))
                convert(sources, place / "model", case.family, **table.settings(case))
            table.write_case(case, place / REFERENCE)
        except Exception as error:
            shutil.rmtree(place)
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return errors


def read(folder: Path) -> dict[str, str]:
    """Every directory below `folder`, verified and run."""
    from weightport.api import check_parity, verify

    errors = {}
    for place in sorted(path.parent for path in folder.rglob(REFERENCE)):
        name = f"{place.parent.name}/{place.name}"
        try:
            wrong = [each.line for each in verify(place / "model").findings if each.severity.value == "wrong"]
            report = check_parity(place / "model", place / REFERENCE)
            if wrong or not report.passed:
                errors[name] = "; ".join([*wrong, *([] if report.passed else [report.verdict])])
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return errors


if __name__ == "__main__":
    sys.path.insert(0, str(GOLDEN))
    print(json.dumps({"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))))
