"""Each rule of the table of faulty versions, at both ends of its range, and nothing outside of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from weightport.cli import main
from weightport.integrity.known_faults import FAULTS, known_faults, release_of

CASES = [
    ("florence2", "4.57.0", "labels twice"),
    ("florence2", "5.12.1", "labels twice"),
    ("florence2", "4.56.2", None),
    ("florence2", "5.13.0", None),
    ("blip-2", "4.52.1", "wrong answers"),
    ("blip-2", "4.52.4", "wrong answers"),
    ("blip-2", "4.51.3", None),
    ("blip-2", "4.53.0", None),
    ("paligemma", "4.48.0", "masks the padding"),
    ("paligemma", "4.48.3", "masks the padding"),
    ("paligemma", "4.47.1", None),
    ("paligemma", "4.49.0.dev0", None),
    ("llama", "4.57.0", None),
    ("florence2", None, None),
    ("florence2", "none", None),
]


@pytest.mark.parametrize(("model_type", "version", "expected"), CASES)
def test_a_version_in_a_rule_s_range_is_warned_of(model_type: str, version: str | None, expected: str | None) -> None:
    found = known_faults({"model_type": model_type, "transformers_version": version})
    assert [expected in each.text for each in found] == ([True] if expected else []), found


@pytest.mark.parametrize(("model_type", "expected"), [("moondream1", "buffers"), ("internvl_chat", "meta device")])
def test_remote_code_is_warned_of_by_the_version_that_would_load_it(model_type: str, expected: str) -> None:
    config: dict[str, Any] = {"model_type": model_type, "transformers_version": "4.44.0", "auto_map": {}}
    (found,) = known_faults(config, running="5.23.0")
    assert expected in found.text
    assert not known_faults(config, running="4.57.6") and not known_faults(
        {**config, "auto_map": None} | {"x": 1}, running="4.1.0"
    )
    del config["auto_map"]
    assert not known_faults(config, running="5.23.0")


def test_every_rule_has_a_case() -> None:
    named = {model_type for model_type, _, expected in CASES if expected} | {"moondream1", "internvl_chat"}
    assert all(named & set(fault.model_types) for fault in FAULTS)


def test_the_record_of_a_training_is_believed_before_the_version_that_wrote_the_configuration() -> None:
    config = {"model_type": "florence2", "transformers_version": "4.57.0"}
    assert not known_faults(config, {"versions": {"transformers": "5.23.0"}})
    (found,) = known_faults({**config, "transformers_version": "5.23.0"}, {"versions": {"transformers": "5.0.0"}})
    assert found.subject == "training.json" and "trained by transformers 5.0.0" in found.text


@pytest.mark.parametrize(
    ("text", "expected"), [("4.57.0.dev0", (4, 57, 0)), ("5.1", (5, 1, 0)), ("x", None), (None, None), (5, None)]
)
def test_versions_are_read(text: object, expected: tuple[int, ...] | None) -> None:
    assert release_of(text) == expected


def test_inspect_warns_and_says_what_changed(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    done = CliRunner().invoke(main, ["inspect", str(model)])
    assert done.exit_code == 0
    assert "warning  config.json: written by transformers 5.0.0, which shifts the labels twice" in done.output
    assert "changed  config.json was changed since weightport wrote it" in done.output
    found = json.loads(CliRunner().invoke(main, ["inspect", str(model), "--json"]).output)
    assert len(found["warning"]) == len(found["changed"]) == 1
