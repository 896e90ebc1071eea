"""The commands in a row: a converted OFA, an adapter trained on it, merged, proven and prepared for the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("peft")

import peft

from weightport import cli
from weightport.adapters.verification import verify
from weightport.adapters.verification.verify import verify_merge, why_not_verified
from weightport.api import load_native

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def ofa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case cn-tiny as port-ofa converts it."""
    sys.path.insert(0, str(GOLDEN))
    import golden

    source = golden.materialize(GOLDEN / "cases" / "ofa" / "cn-tiny", tmp_path_factory.mktemp("original"))
    out = tmp_path_factory.mktemp("converted") / "ofa"
    assert run(cli.port_ofa, source, out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def adapter(ofa: Path) -> Path:
    model = peft.get_peft_model(
        load_native(ofa), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"])
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(ofa.parent / "adapter")
    return ofa.parent / "adapter"


def run(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_from_the_original_checkpoint_to_a_published_model(ofa: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = run(cli.port_merge_lora, ofa, adapter, merged, "--verify")
    assert done.exit_code == 0, done.output
    assert "seams agree" in done.output and "logits" in done.output
    record = json.loads((merged / "merge.json").read_text())
    found = record["verification"]
    assert found["weights"] == found["changed"] == len(record["changed"]) > 10 and not found["unchecked"]
    assert record["weights_check"]["compared"] == len(record["changed"])
    assert "pixel_values" in record["verification"]["inputs"]
    said = run(cli.main, "generate", merged, "--prompt", "你好")
    assert said.exit_code == 0, said.output
    released = run(cli.port_release, merged, "--repo", "somebody/ofa", "--dry-run")
    assert released.exit_code == 0, released.output
    assert "What was merged" in released.output and "Where it comes from" in released.output


def test_adapters_take_weights_and_json_is_all_that_is_printed(ofa: Path, adapter: Path, tmp_path: Path) -> None:
    done = run(
        cli.port_merge_lora, ofa, f"{adapter}=0.7", f"{adapter}=-0.2", tmp_path / "out", "--no-verify", "--json"
    )
    assert done.exit_code == 0, done.output
    assert [entry["weight"] for entry in json.loads(done.output)["adapters"]] == [0.7, -0.2]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{adapter}=much"], 2, "folder and its weight"),
        (["{adapter}", "{adapter}", "--combination", "dare_ties", "--density", "0.5"], 2, "at random"),
        (["{adapter}", "--density", "0.5"], 2, "--density"),
        (["missing"], 2, "missing does not exist"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_usage_is_one_message_and_nothing_written(
    arguments: list[str], status: int, message: str, ofa: Path, adapter: Path, tmp_path: Path
) -> None:
    given = [argument.format(adapter=adapter) for argument in arguments]
    done = run(cli.port_merge_lora, ofa, *given, tmp_path / "out")
    assert done.exit_code == status, done.output
    assert message in done.output and "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_wrong_scaling_is_seen_without_peft(
    ofa: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted mistake of a ten-thousandth, which outputs hardly show."""
    plant(monkeypatch, 1 + 1e-4)
    done = run(cli.port_merge_lora, ofa, adapter, tmp_path / "out", "--no-verify")
    assert done.exit_code == 1 and "computed a second time" in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def plant(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    from weightport.adapters.reading.lora_settings import LoraSettings

    right = LoraSettings.scaling
    monkeypatch.setattr(LoraSettings, "scaling", lambda self, module: factor * right(self, module))


@pytest.mark.parametrize(
    ("factor", "noise", "message"),
    [(2.0, 48.0, "is not base + adapter"), (1 + 1e-4, 1e6, "roundings from peft's own")],
)
def test_wrong_scaling_is_seen_by_peft(
    factor: float,
    noise: float,
    message: str,
    ofa: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the outputs, and where these hardly show it, in the weights; the first check set aside."""
    from weightport.adapters.merging.weights_check import TensorProof

    plant(monkeypatch, factor)
    monkeypatch.setattr(TensorProof, "finish", lambda self: 0.0)
    monkeypatch.setattr(verify, "_ARITHMETIC_NOISE", noise)
    done = run(cli.port_merge_lora, ofa, adapter, tmp_path / "out", "--verify")
    assert done.exit_code == 1 and message in done.output
    assert not (tmp_path / "out").exists()


def test_check_is_not_run_where_the_model_does_not_fit(ofa: Path, adapter: Path, tmp_path: Path) -> None:
    from weightport.adapters.merging.merge import Written
    from weightport.api import merge_lora

    seen: list[Written] = []
    merge_lora(ofa, [(adapter, 1.0)], tmp_path / "out", check=lambda written: seen.append(written))
    assert "GB are free" in str(why_not_verified(seen[0], available=1000))
    assert why_not_verified(seen[0], available=1 << 40) is None
    assert callable(verify_merge)


def test_extraction_reports_what_the_rank_keeps(ofa: Path, adapter: Path, tmp_path: Path) -> None:
    assert run(cli.port_merge_lora, ofa, adapter, tmp_path / "tuned", "--no-verify", "-q").exit_code == 0
    done = run(cli.main, "extract-lora", tmp_path / "tuned", ofa, tmp_path / "again", "--rank", "4")
    assert done.exit_code == 0, done.output
    assert "kept     100.0%" in done.output
