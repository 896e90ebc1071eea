"""A family from outside: the package in examples/family, installed as a user would, listed, converted and judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightport.checkpoints import open_checkpoint
from weightport.families.registry import BUILT_IN

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


def test_list_of_families_says_whether_the_installed_cases_pass(installed):
    finished = weightport(installed, "families", "--check")
    assert finished.returncode == 0, finished.stderr
    assert "tiny: 7 of 7 checks hold" in finished.stdout
    assert finished.stdout.count("none are installed with it (--cases DIR)") == len(BUILT_IN)


def test_a_case_that_does_not_pass_is_shown_with_its_reason(installed, tmp_path):
    case = tmp_path / "cases" / "spoiled"
    shutil.copytree(CASE, case)
    tensors = open_checkpoint(case / "tellit.pt")
    document = {"model": {name.removeprefix("model."): ref.read() for name, ref in tensors.items()}}
    name = next(name for name, value in document["model"].items() if value.is_floating_point() and value.ndim == 2)
    document["model"][name] = document["model"][name] + 0.5
    torch.save({**torch.load(case / "tellit.pt", weights_only=True), **document}, case / "tellit.pt")
    finished = weightport(installed, "families", "--cases", tmp_path / "cases", "--json")
    assert finished.returncode == 1, finished.stderr
    found = {each["name"]: each for each in json.loads(finished.stdout)}
    assert found["tellit"]["cases"] == {"tiny": True, "spoiled": False}
    assert found["ofa"]["cases"] == {}


def test_cases_of_a_family_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "case.json").write_text('{"family": "llava"}')
    finished = weightport(dict(os.environ), "families", "--cases", tmp_path)
    assert finished.returncode == 1 and "There is no family 'llava'" in finished.stderr
    (tmp_path / "one" / "case.json").write_text("[]")
    finished = weightport(dict(os.environ), "families", "--cases", tmp_path)
    assert finished.returncode == 1 and "case.json should hold a JSON object; found list" in finished.stderr


def test_option_of_another_family_is_a_usage_error(installed, tmp_path):
    finished = weightport(installed, "convert", CASE / "tellit.pt", tmp_path / "out", "--ema")
    assert finished.returncode == 2
    assert "--ema means nothing for a checkpoint of Tellit, whose own options are --lower-case" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_family_that_is_not_installed_is_not_known():
    finished = weightport(dict(os.environ), "convert", CASE / "tellit.pt", "out")
    assert finished.returncode == 1
    assert "is not a checkpoint of OFA or Florence-2" in finished.stderr
