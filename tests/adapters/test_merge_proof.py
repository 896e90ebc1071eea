"""The two checks of a merge: what they compare is what changed, and what they cannot compare is said, not passed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import tiny_families
from matrix import ARCHITECTURES, CONFIGURATIONS, options_of, write_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_merge_names import EARLIER, renamed
from tiny_models import write_adapter

from weightport.adapters.merging.merge import Written
from weightport.adapters.merging.weights_check import WeightsCheck, check_weights
from weightport.adapters.verification import sample_inputs, verify
from weightport.adapters.verification.verify import Verification, verify_merge
from weightport.api import merge_lora
from weightport.errors import ParityError


def merged(base: Path, adapter: Path, out: Path, options: object = None) -> tuple[WeightsCheck, Verification]:
    found: list[WeightsCheck | Verification] = []
    merge_lora(
        base, [(adapter, 1.0)], out, options, weighed=found.append, check=lambda w: found.append(verify_merge(w))
    )
    return found[0], found[1]


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("paligemma", "all-linear"),
        ("llava", "parameters-patterns"),
        ("mixtral", "parameters"),
        ("gemma", "embedding"),
        ("blip2", "tokens-added-rows"),
        ("gpt2", "dora"),
    ],
)
def test_both_checks_compare_every_changed_tensor(name: str, configuration: str, tmp_path: Path) -> None:
    base = write_model(name, tmp_path / "base")
    chosen = CONFIGURATIONS[configuration]
    config = chosen.make(name)
    assert config is not None
    adapter = write_adapter(base, tmp_path / "adapter", config, change=chosen.change)
    weights, model = merged(base, adapter, tmp_path / "out", options_of(name, configuration))
    assert weights.compared == weights.changed == model.changed == model.weights > 1
    assert weights.furthest <= 1 and model.weight_steps <= 1 and model.seams
    assert not weights.unchecked and not model.unchecked


def test_adapter_with_earlier_names_is_checked_under_todays(tmp_path: Path) -> None:
    base = write_model("qwen2_vl", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules="all-linear"))
    earlier = renamed(adapter, tmp_path / "earlier", EARLIER["qwen2_vl"], target_modules=["q_proj"])
    _, model = merged(base, earlier, tmp_path / "out")
    assert model.weights == model.changed and model.seams and not model.unchecked


def test_keys_that_peft_does_not_load_are_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model("qwen2_vl", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    earlier = renamed(adapter, tmp_path / "earlier", EARLIER["qwen2_vl"])
    monkeypatch.setattr(verify, "_under_todays_names", lambda adapter, names, stack: adapter.folder)
    weights, model = merged(base, earlier, tmp_path / "out")
    assert weights.compared == weights.changed
    assert not model.seams and model.weights == 0 and set(model.unchecked) and model.changed == len(model.unchecked)
    assert "peft did not load" in next(iter(model.unchecked.values()))


def test_tower_that_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model("llava", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    monkeypatch.setattr(sample_inputs, "_image_and_text", lambda model: {})
    monkeypatch.setattr(sample_inputs, "_image_beside_text", lambda model: {})
    monkeypatch.setattr(sample_inputs, "_image", lambda model: {})
    _, model = merged(base, adapter, tmp_path / "out")
    assert model.unchecked and all(name.startswith("vision_tower.") for name in model.unchecked)
    assert all("does not run" in reason for reason in model.unchecked.values())


@pytest.mark.parametrize("name", ["mixtral", "paligemma"])
def test_one_wrong_element_in_the_files_is_seen(name: str, tmp_path: Path) -> None:
    base = write_model(name, tmp_path / "base")
    chosen = CONFIGURATIONS["parameters"].make(name)
    assert chosen is not None
    adapter = write_adapter(base, tmp_path / "adapter", chosen)

    def spoil(written: Written) -> None:
        path = written.folder / "model.safetensors"
        tensors = load_file(path)
        changed = next(out.name for out in written.plan.outputs if out.edit is not None)
        tensors[changed].view(-1)[3] *= 1 + 2e-6
        save_file(tensors, path, {"format": "pt"})
        check_weights(written.folder, written.plan, written.adapters, written.weights)

    with pytest.raises(ParityError, match="computed a second time"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out", check=spoil)


@pytest.mark.parametrize(
    ("name", "part"), [("llava", "vision_tower"), ("llava", "language_model"), ("paligemma", "vision_tower")]
)
def test_wrong_weight_anywhere_in_a_vision_language_model_is_seen_by_running_it(
    name: str, part: str, tmp_path: Path
) -> None:
    base = write_model(name, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    seams: list[Verification] = []

    def spoil(written: Written) -> None:
        seams.append(verify_merge(written))
        path = written.folder / "model.safetensors"
        tensors = load_file(path)
        tensors[next(o.name for o in written.plan.outputs if o.edit is not None and part in o.name)].mul_(1.5)
        save_file(tensors, path, {"format": "pt"})
        verify_merge(written)

    with pytest.raises(ParityError, match="The merged model is not base"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out", check=spoil)
    assert seams[0].weights == seams[0].changed and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*tiny_families.FAMILIES, "bert", "resnet", "t5"])
def test_made_up_inputs_run_every_module_of_the_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    arguments = sample_inputs.sample_inputs(model, tmp_path)
    ran: set[str] = set()
    for key, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, key=key: ran.add(key))
    with torch.no_grad():
        model(**arguments)
    # T5 looks tokens up in its encoder's and decoder's own tables.
    assert {key.rpartition(".")[0] for key, _ in model.named_parameters()} - ran <= {"shared"}
