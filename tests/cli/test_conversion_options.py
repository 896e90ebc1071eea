"""Options of a conversion: what is given up stays told, and nothing that is asked for is ignored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from weightport import cli

HEAD = "classification_heads.mnli.dense.weight"


def weightport(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def florence2(tmp_path_factory) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
    import golden

    case = Path(golden.__file__).parent / "cases" / "florence2" / "tiny-ft-untied"
    return golden.materialize(case, tmp_path_factory.mktemp("florence2")).parent


def plan_line(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("plan"))


def test_what_was_dropped_does_not_hinder_the_export(port, spoiled, tmp_path, document):
    source = spoiled(lambda model: model.update({HEAD: torch.ones(3, 3)}))
    result = port(source, "--drop", "classification_heads.**", out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    result = weightport("export", tmp_path / "out", tmp_path / "back.pt")
    assert result.exit_code == 0, result.output
    back = torch.load(tmp_path / "back.pt", weights_only=False)["model"]
    assert set(back) == set(document["model"])
    assert all(torch.equal(back[name], tensor) for name, tensor in document["model"].items())
    report = json.loads(weightport("compare", source, tmp_path / "back.pt", "--json").output)
    assert report["counts"]["only in A"] == 1 and report["counts"]["only in B"] == report["counts"]["different"] == 0


@pytest.mark.parametrize("pattern", ["model.classification_heads.**", "classification_heads.mnli.dense.{weight,bias}"])
def test_a_tensor_is_dropped_by_the_name_that_inspect_shows(port, spoiled, tmp_path, pattern):
    source = spoiled(lambda model: model.update({HEAD: torch.ones(3, 3)}))
    result = port(source, "--drop", pattern, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [each["name"] for each in record["dropped"] if "request" in each["because"]] == [HEAD]


def test_a_pattern_that_drops_nothing_is_a_usage_error(port, checkpoint, tmp_path):
    result = port(checkpoint, "--drop", "classification_heads.*")
    assert result.exit_code == 2, result.output
    assert "--drop classification_heads.* matches none of the model's 335 tensors" in result.stderr
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["decoder.layers.1.fc2.bias", "encoder.embed_tokens.weight"])
def test_a_dropped_tensor_that_the_model_needs_is_not_called_missing_from_the_file(port, checkpoint, name):
    result = port(checkpoint, "--drop", name)
    assert result.exit_code == 1
    assert "1 left out on request, but the model cannot do without" in result.stderr
    assert f"{name} (left out on request (--drop {name}))" in result.stderr
    assert "nothing in the file" not in result.stderr and "missing from the checkpoint" not in result.stderr


def test_the_plan_s_numbers_add_up(port, checkpoint, tmp_path):
    result = port(checkpoint, out=tmp_path / "out")
    # 335 - 7 - 2 = 326
    assert "335 tensors → 326 · 7 dropped" in plan_line(result.output)
    assert plan_line(result.output).endswith("· 2 tied (the same matrix under a further name)")


@pytest.mark.parametrize(
    "options", [["--image-token", "append"], ["--image-token", "append", "--vocab", "none"]], ids=["plain", "no vocab"]
)
def test_an_option_of_another_family_is_not_ignored(checkpoint, tmp_path, options):
    result = weightport("convert", checkpoint, tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert "--image-token means nothing for a checkpoint of OFA" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--portable", "--parse-symbols"])
def test_an_option_of_ofa_is_not_ignored_for_florence2(florence2, tmp_path, option):
    result = weightport("convert", florence2, tmp_path / "out", option)
    assert result.exit_code == 2, result.output
    assert f"{option} means nothing for a checkpoint of Florence-2" in result.stderr
    result = CliRunner().invoke(cli.port_florence2, [str(florence2), str(tmp_path / "out"), option])
    assert result.exit_code == 2 and "No such option" in result.stderr
    assert not (tmp_path / "out").exists()
