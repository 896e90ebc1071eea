"""A family from outside: the package in examples/family, installed as a user would, listed, converted and judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "family"
CASE = EXAMPLE / "cases" / "tiny"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package is installed."""
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "family"
    subprocess.run(["cp", "-r", str(EXAMPLE), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, capture_output=True)
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *([before] if before else [])])}


def weightport(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from weightport.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_family_of_another_package_is_listed_with_its_options(installed):
    found = {each["name"]: each for each in json.loads(weightport(installed, "families", "--json").stdout)}
    assert found["tellit"]["package"] == "weightport-tellit"
    assert "--lower-case" in found["tellit"]["options"]
    assert {"ofa", "florence2"} <= set(found)


def test_family_of_another_package_keeps_its_word(installed):
    finished = weightport(installed, "family-check", "tellit", CASE, "--json")
    checks = {each["name"]: each for each in json.loads(finished.stdout)}
    assert [name for name, each in checks.items() if not each["passed"]] == [], finished.stdout
    assert set(checks) == {
        "declaration", "recognition", "coverage", "round trip", "parity", "planted mistakes", "training step",
    }  # fmt: skip
    assert finished.returncode == 0


def test_option_of_another_family_is_a_usage_error(installed, tmp_path):
    finished = weightport(installed, "convert", CASE / "tellit.pt", tmp_path / "out", "--ema")
    assert finished.returncode == 2
    assert "--ema means nothing for a checkpoint of Tellit, whose own options are --lower-case" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_family_that_is_not_installed_is_not_known():
    finished = weightport(dict(os.environ), "convert", CASE / "tellit.pt", "out")
    assert finished.returncode == 1
    assert "is not a checkpoint of OFA or Florence-2" in finished.stderr
