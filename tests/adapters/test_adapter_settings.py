"""adapter_config.json from strangers: any JSON value in any field, and patterns made to take for ever."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig
from tiny_models import write_adapter, write_base

from weightport.adapters.merging.merge import MergeOptions
from weightport.adapters.reading.lora_config import parse_merge_settings
from weightport.adapters.reading.lora_dumps import merge_dump
from weightport.adapters.reading.lora_settings import parse_lora_settings, parse_settings
from weightport.adapters.reading.lora_tensors import open_adapter
from weightport.api import merge_lora, port_adapter
from weightport.converters import lora_patterns
from weightport.errors import AdapterError, WeightportError

ENDLESS = "(.*a|.*o|.*)*!"

# One value of every JSON type, and those at its edges.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 4, 10**400, 0.5, float("nan"), float("inf"), 1e300, "", "q_proj", "(", "a" * 30_000,
    "(" * 5_000, "\ud800", "x{99999999999}", [], [[]], [None], [0], [-1], ["q_proj"], ["("], [{}], [10**30], {},
    {"q_proj": None}, {"q_proj": 4}, {"q_proj": "4"}, {"q_proj": [0]}, {"q_proj": {}}, {"(": 4}, {"": 1},
)  # fmt: skip
# What a merge looks at after it has opened the adapter.
READ_LATER = (
    "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_bias", "modules_to_save", "target_modules", "target_parameters",
    "trainable_token_indices", "use_rslora",
)  # fmt: skip
FIELDS = sorted({*LoraConfig().to_dict(), "peft_type", "ensure_weight_tying", "unknown_field"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama", tmp_path_factory.mktemp("settings") / "base", torch.float16)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return write_adapter(base, base.parent / "adapter", config)


def changed(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def spoiled(adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_no_json_value_in_any_field_of_the_settings_escapes_as_another_error(
    base: Path, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    path, out = spoiled / "adapter_config.json", spoiled.parent / "out"
    given, refused, defects = json.loads(path.read_text()), 0, []
    for field, value in itertools.product(FIELDS, VALUES):
        path.write_text(json.dumps({**given, field: value}))
        try:
            open_adapter(spoiled)
            if field in READ_LATER:
                merge_lora(base, [(spoiled, 1.0)], out, MergeOptions(overwrite=True))
        except WeightportError as error:
            refused += 1
            assert len(str(error)) < 1_000, field
        except Exception as error:
            defects.append(f"{field}: {json.dumps(value)[:40]}: {type(error).__name__}: {error}"[:200])
    assert not defects
    assert refused > 400


@pytest.mark.parametrize("parse", [parse_lora_settings, parse_settings, parse_merge_settings])
def test_parsed_settings_answer_for_any_module(parse: Callable[[Any, str], Any]) -> None:
    """What parsing accepts gives a rank, an alpha and a scaling of any module."""
    for field in FIELDS:
        for value in VALUES:
            try:
                settings = parse({"peft_type": "LORA", field: value}, "here")
            except WeightportError:
                continue
            assert settings.rank("model.q_proj") >= 1
            assert abs(settings.scaling("model.q_proj")) < 1e31


@pytest.mark.parametrize("field", ["lora_alpha", "r"])
@pytest.mark.parametrize("parse", [parse_lora_settings, parse_merge_settings])
def test_null_is_no_strength_of_an_adapter(field: str, parse: Callable[[Any, str], Any]) -> None:
    with pytest.raises(AdapterError, match=rf"here: {field} is null; expected a"):
        parse({"peft_type": "LORA", field: None}, "here")


def test_switch_written_as_text_is_not_taken_for_true() -> None:
    with pytest.raises(AdapterError, match="use_dora is 'false'; expected true or false"):
        parse_merge_settings({"peft_type": "LORA", "use_dora": "false"}, "here")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"modules_to_save": [ENDLESS]},
        {"layers_pattern": [ENDLESS], "layers_to_transform": [0]},
        {"rank_pattern": {"(.?|.?)" * 40 + "!": 4}},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_pattern_that_never_ends_is_refused_by_a_limit_that_names_itself(
    fields: dict[str, Any], base: Path, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_patterns, "SECONDS", 1)
    changed(spoiled, **fields)
    with pytest.raises(AdapterError, match=r"takes longer than 1 seconds, which is the limit"):
        merge_lora(base, [(spoiled, 1.0)], spoiled.parent / "out")
    assert not (spoiled.parent / "out").exists()


def test_pattern_that_never_ends_is_refused_in_the_other_readers_too(
    base: Path, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_patterns, "SECONDS", 1)
    with pytest.raises(AdapterError, match="which is the limit"):
        tensors = {f"model.layers.0.self_attn.q_proj.lora_{side}.default.weight": object() for side in "AB"}
        merge_dump(tensors, {"peft_type": "LORA", "r": 4, "alpha_pattern": {ENDLESS: 4}}, "model.bin")  # type: ignore[arg-type]
    changed(spoiled, modules_to_save=[ENDLESS])
    monkeypatch.setattr("weightport.adapters.porting.read_base", lambda base, families: None)
    with pytest.raises(AdapterError, match="which is the limit"):
        port_adapter(spoiled, spoiled.parent / "ported", base)


def test_ordinary_patterns_pass_and_choose_what_peft_chooses(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\.(0|1)\.self_attn\.(q|v)_proj")
    config.rank_pattern, config.alpha_pattern = {r"layers\.[01]\..*q_proj": 2}, {"v_proj": 16}
    adapter = write_adapter(base, tmp_path / "adapter", config)
    assert len(merge_lora(base, [(adapter, 1.0)], tmp_path / "out").record["changed"]) == 4


def test_text_of_exclude_modules_is_one_pattern_and_not_a_list_of_letters() -> None:
    settings = parse_merge_settings({"peft_type": "LORA", "target_modules": ["x"], "exclude_modules": "xy"}, "here")
    assert settings.targets("model.x")


def test_busy_machine_refuses_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is of processor time: a trial that waits for its turn is not over it."""
    monkeypatch.setattr(lora_patterns, "SECONDS", 1)
    monkeypatch.setattr(lora_patterns, "_TRIAL", "import time; time.sleep(1.5)\n" + lora_patterns._TRIAL)
    lora_patterns.require_bounded([(".*q_proj", ".*q_proj")], ["model.q_proj"], "here")
