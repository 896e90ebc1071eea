"""Configuration, tensors, names, tokenizer and processor against one another; directories without any record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from weightport.api import verify
from weightport.cli import main
from weightport.integrity.findings import Severity

TEXT = "model.language_model.encoder.layers.0.fc1.weight"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def lose_a_tensor(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("fc1.weight"))))


def add_a_tensor(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model.stranger": torch.zeros(2)}))


def narrow_a_tensor(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("fc1.weight"))
        tensors[name] = tensors[name][:-1].clone()

    edit_tensors(model, change)


def more_layers(model: Path) -> None:
    edit(model / "config.json", lambda config: config["text_config"].update(encoder_layers=9))


def fewer_layers(model: Path) -> None:
    edit(model / "config.json", lambda config: config["text_config"].update(decoder_layers=1))


def wide_by_name(model: Path) -> None:
    edit(model / "config.json", lambda config: config["text_config"].update(d_model="wide"))


def no_model_type(model: Path) -> None:
    edit(model / "config.json", lambda config: config.pop("model_type"))


def more_tokens(model: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        last = max(tokenizer["model"]["vocab"].values())
        added = max([last, *(each["id"] for each in tokenizer["added_tokens"])]) + 1
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": added, "content": "<one_too_many>"})

    edit(model / "tokenizer.json", change)


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def larger_pictures(model: Path) -> None:
    side = {"height": 6144, "width": 6144}
    edit(
        model / "processor_config.json", lambda settings: settings["image_processor"].update(size=side, crop_size=side)
    )


def another_image_token(model: Path) -> None:
    edit(model / "config.json", lambda config: config.update(image_token_id=5))


@pytest.mark.parametrize(
    ("spoil", "subject", "message"),
    [
        (lose_a_tensor, "tensors", "1 that the configuration asks for are missing: .*fc1.weight"),
        (add_a_tensor, "tensors", "1 have no place in the configured model: model.stranger"),
        (narrow_a_tensor, "tensors", r"fc1.weight gives \[\d+, \d+\], the configuration \[\d+, \d+\]"),
        (more_layers, "tensors", "that the configuration asks for are missing"),
        (fewer_layers, "tensors", "have no place in the configured model"),
        (wide_by_name, "config.json", "builds no model .*d_model"),
        (no_model_type, "config.json", "names no model_type"),
        (more_tokens, "tokenizer", "gives ids up to .*one_too_many.*, the embedding has 1381 rows"),
        (broken_tokenizer, "tokenizer", "cannot be loaded"),
        (larger_pictures, "processor", "the model has positions for"),
        (another_image_token, "processor", "image_token_id"),
    ],
)
def test_parts_that_do_not_belong_together_are_found(
    spoil: Callable[[Path], None], subject: str, message: str, foreign: Path
) -> None:
    import re

    spoil(foreign)
    found = verify(foreign)
    wrongs = found.of(Severity.WRONG)
    assert any(each.subject == subject and re.search(message, each.text) for each in wrongs), found.findings


def test_names_of_a_running_model_load_and_are_warned_of(foreign: Path) -> None:
    """Names that transformers still takes, and programs that serve the model do not."""
    from weightport.converters.name_spaces import meta_model

    space = meta_model(foreign)
    prefix = type(space).base_model_prefix + "."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(prefix + "vision_tower."):
                tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit_tensors(foreign, change)
    found = verify(foreign)
    assert found.passed, found.findings
    (warned,) = found.of(Severity.WARNING)
    assert warned.subject == "names" and "vision_tower." in warned.text


def test_a_model_of_no_family_is_checked_by_transformers_own_class(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    found = verify(tmp_path)
    assert found.passed and found.checked[0].startswith("tensors:"), found.findings
    assert "tokenizer" in {each.subject for each in found.of(Severity.UNCHECKED)}
    edit(tmp_path / "config.json", lambda content: content.update(num_hidden_layers=2))
    assert not verify(tmp_path).passed


def test_a_model_that_transformers_does_not_know_is_not_judged(foreign: Path) -> None:
    edit(
        foreign / "config.json",
        lambda config: config.update(model_type="never_heard_of", auto_map={"AutoModel": "m.M"}),
    )
    found = verify(foreign)
    assert found.passed
    assert any(each.subject == "model" and "its own code is not run" in each.text for each in found.findings)


def test_findings_are_one_line_each_and_the_status_is_1(foreign: Path) -> None:
    lose_a_tensor(foreign)
    broken_tokenizer(foreign)
    shown = CliRunner().invoke(main, ["verify", str(foreign)])
    assert shown.exit_code == 1
    assert sum(line.startswith("wrong ") for line in shown.output.splitlines()) == 2
    assert shown.output.splitlines()[-1] == "2 findings"
    quiet = CliRunner().invoke(main, ["verify", str(foreign), "--quiet"])
    assert quiet.exit_code == 1 and not quiet.stdout
    assert [line.startswith(f"{foreign}: ") for line in quiet.stderr.splitlines()] == [True, True]
    parsed = json.loads(CliRunner().invoke(main, ["verify", str(foreign), "--json"]).stdout)
    assert parsed["passed"] is False
    assert sum(each["severity"] == "wrong" for each in parsed["findings"]) == 2


def test_a_whole_directory_ends_with_0_and_quiet_says_nothing(model: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(model), "--quiet"])
    assert (done.exit_code, done.output) == (0, "")


def test_an_original_checkpoint_is_named_as_one(converted: Path, tmp_path: Path) -> None:
    import golden

    case = Path(golden.__file__).parent / "cases" / "florence2" / "tiny-main"
    source = golden.materialize(case, tmp_path / "original").parent
    found = verify(source)
    assert found.passed
    assert any("an original checkpoint of florence2" in each.text for each in found.of(Severity.UNCHECKED))
    assert [each.subject for each in found.of(Severity.WARNING)] == ["weights"]


@pytest.mark.parametrize(("what", "message"), [("file", "no config.json|is not a model"), ("empty", "no config.json")])
def test_what_is_no_model_directory_is_one_error(what: str, message: str, tmp_path: Path) -> None:
    import re

    target = tmp_path / "target"
    target.write_text("x") if what == "file" else target.mkdir()
    done = CliRunner().invoke(main, ["verify", str(target)])
    assert done.exit_code == 1 and re.search(message, done.output), done.output
    assert "defect" not in done.output
