"""A golden test that judges nothing fails: without a case, with large cases only, or by skipping itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASE = '{"family": "ofa", "checkpoints": []}'
LARGE = '{"family": "ofa", "checkpoints": [{"tensors": {"a": {"shape": [1000000000], "dtype": "float32"}}}]}'
HEAD = "import pytest\nfrom golden_case import Case\nfrom needs import has_averaged_weights, has_checkpoint, judges\n"


def judged(folder: Path, test: str, **cases: str) -> str:
    """What pytest says of a golden test, in a copy of this folder with these cases."""
    golden = folder / "golden"
    golden.mkdir()
    for file in ("conftest.py", "golden.py", "golden_case.py", "needs.py", "reference_builder.py"):
        shutil.copy(HERE / file, golden)
    for table in HERE.glob("*_cases.py"):
        if not table.name.startswith("test_"):
            shutil.copy(table, golden)
    shutil.copy(HERE.parent / "conftest.py", folder)
    for name, text in cases.items():
        (golden / "cases" / name).mkdir(parents=True)
        (golden / "cases" / name / "case.json").write_text(text)
    (golden / "test_one.py").write_text(HEAD + test)
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-o", "markers=slow:\njudges:"]
    command = [sys.executable, "-m", "pytest", *map(str, options), str(golden)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder).stdout


@pytest.mark.parametrize("cases", [{}, {"one": CASE}])
def test_golden_test_without_a_case_is_an_error(tmp_path: Path, cases: dict[str, str]) -> None:
    said = judged(tmp_path, "@judges(has_averaged_weights)\ndef test_it(case: Case): ...\n", **cases)
    assert "test_one.py::test_it runs on none of the repository's own golden cases. Give it" in said
    assert "1 error" in said


def test_golden_test_of_large_cases_alone_is_an_error(tmp_path: Path) -> None:
    said = judged(tmp_path, "@judges(has_checkpoint)\ndef test_it(case: Case): ...\n", one=LARGE)
    assert "runs on none of the repository's own golden cases: all are large" in said
    assert "1 error" in said


def test_golden_test_that_skips_itself_fails(tmp_path: Path) -> None:
    said = judged(tmp_path, "def test_it(case: Case): pytest.skip('not here')\n", one=CASE)
    assert "test_it[one] skips itself: state with @judges" in said
    assert "1 failed" in said


def test_golden_test_runs_on_the_cases_that_have_what_it_needs(tmp_path: Path) -> None:
    small = LARGE.replace("1000000000", "10")
    said = judged(
        tmp_path, "@judges(has_checkpoint)\ndef test_it(case: Case): assert case.name == 'two'\n", one=CASE, two=small
    )
    assert "1 passed" in said
