"""What is frozen stands still: parameters, batch statistics, dropout; and what is trained is counted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run, still, trained_model
from torch import nn

from weightport.errors import RecipeError, TrainingError
from weightport.families.registry import registry
from weightport.finetuning.recipes.settings import ModelSettings
from weightport.finetuning.setup.freezing import freeze, frozen_parts, shares
from weightport.finetuning.setup.model_loading import load_model

STEPS = {
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 2,
    "training.max_steps": 2,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}
DROPOUT = (nn.Dropout, nn.Dropout2d)


def load(directory: Path) -> Any:
    return load_model(directory, registry().of_directory(directory).training, ModelSettings())


def frozen_model(directory: Path, family: str, targets: tuple[str, ...], *, keep_still: bool = True) -> Any:
    model = load(directory)
    parts = registry()[family].training.parts
    freeze(model, parts, frozen_parts(parts, targets), still=keep_still)
    return model.train()


@pytest.mark.parametrize("target", ["vision", "projector", "embeddings", "encoder", "decoder", "language"])
@pytest.mark.parametrize("name", ["ofa", "florence2"])
def test_frozen_parameters_have_the_same_bits_after_training(
    name: str,
    target: str,
    tiny: Callable[[str], Path],
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    trained = trained_model(monkeypatch)
    settings = {"batch.image_size": 64} if name == "ofa" else {}
    run(tiny(name), "default", pairs, tmp_path / "run", more={**STEPS, **settings, "model.freeze": [target]})
    parts = registry()[name].training.parts
    frozen = frozen_parts(parts, (target,))
    before, after = load(tiny(name)).state_dict(), trained[0].state_dict()
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    of_frozen = {key for key in before if parts.part_of(key) in frozen}
    if "embeddings" in frozen:
        of_frozen |= {key for key in before if key.startswith("lm_head.")}
    assert not moved & of_frozen, f"frozen, and changed: {sorted(moved & of_frozen)[:5]}"
    assert moved, "nothing was trained"


def test_batch_statistics_of_a_frozen_tower_do_not_move_and_those_of_a_trained_one_do(
    tiny: Callable[[str], Path], pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = trained_model(monkeypatch)
    before = load(tiny("ofa")).state_dict()
    statistics = [key for key in before if "running_" in key]
    assert statistics
    for frozen, changes in ((["vision"], False), ([], True)):
        run(
            tiny("ofa"), "default", pairs, tmp_path / str(changes),
            more={**STEPS, "batch.image_size": 64, "model.freeze": frozen},
        )  # fmt: skip
        after = trained[-1].state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in statistics) is changes


@pytest.mark.parametrize(("name", "family"), [("ofa", "ofa"), ("florence2", "florence2")])
def test_dropout_is_off_in_frozen_parts_and_on_elsewhere(name: str, family: str, tiny: Callable[[str], Path]) -> None:
    model = frozen_model(tiny(name), family, ("encoder",))
    encoder, decoder = (
        (model.model.encoder, model.model.decoder)
        if family == "ofa"
        else (model.model.language_model.encoder, model.model.language_model.decoder)
    )
    for layers, training in ((encoder.layers, False), (decoder.layers, True)):
        assert all(module.training is training for module in layers.modules())
    # What calls train() again, as Trainer does before every step, does not wake it.
    model.eval()
    model.train()
    assert not any(module.training for module in encoder.layers.modules())
    assert all(module.training for module in decoder.layers.modules())
    moving = frozen_model(tiny(name), family, ("encoder",), keep_still=False)
    still_ones = [name for name, module in moving.named_modules() if not module.training]
    # OFA's own train() holds the batch statistics of a frozen tower.
    assert all(name.endswith("normalization") for name in still_ones)


def test_trained_embeddings_inside_a_frozen_encoder_are_trained(tiny: Callable[[str], Path]) -> None:
    model = frozen_model(tiny("ofa"), "ofa", ("encoder",))
    assert model.model.encoder.embed_tokens.weight.requires_grad
    assert not any(p.requires_grad for p in model.model.encoder.layers.parameters())
    both = frozen_model(tiny("ofa"), "ofa", ("encoder", "embeddings"))
    assert not both.lm_head.weight.requires_grad, "the head is the embeddings, and they are frozen"


def test_repeated_outputs_of_a_frozen_encoder_are_the_same(tiny: Callable[[str], Path]) -> None:
    model = frozen_model(tiny("florence2"), "florence2", ("encoder", "embeddings"))
    encoder, ids = model.model.language_model.encoder, torch.arange(4, 12)[None]
    assert torch.equal(encoder(ids)[0], encoder(ids)[0])
    moving = frozen_model(tiny("florence2"), "florence2", ("encoder",), keep_still=False)
    encoder = moving.model.language_model.encoder
    assert not torch.equal(encoder(ids)[0], encoder(ids)[0]), "the test could not see dropout"


@pytest.mark.parametrize(("name", "family"), [("ofa", "ofa"), ("ofa-cn", "ofa"), ("florence2", "florence2")])
def test_shares_cover_the_model_and_count_tied_weights_once(
    name: str, family: str, tiny: Callable[[str], Path]
) -> None:
    model = load(tiny(name))
    parts = registry()[family].training.parts
    found = {share.part: share for share in shares(model, parts)}
    assert "other" not in found, "parameters belong to no part"
    distinct = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert sum(share.total for share in found.values()) == sum(distinct.values())
    assert all(share.trainable == share.total for share in found.values())
    assert found["embeddings"].total == model.get_input_embeddings().weight.numel()
    assert ("head" in found) is not model.config.tie_word_embeddings

    freeze(model, parts, frozen_parts(parts, ("vision",)), still=True)
    after = {share.part: share for share in shares(model, parts)}
    assert after["vision"].trainable == 0 and after["vision"].total == found["vision"].total
    assert after["decoder"] == found["decoder"]


def test_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"no freeze target 'tower'.*vision, projector"):
        frozen_parts(registry()["florence2"].training.parts, ("vision", "tower"))


def test_nothing_left_to_train_is_refused(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    for name in ("florence2", "ofa"):
        with pytest.raises(TrainingError, match="Nothing is left to train"):
            run(
                tiny(name), "default", pairs, tmp_path / "run",
                more={**STEPS, "model.freeze": ["vision", "projector", "language"]},
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_record_of_a_run_says_what_was_trained(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more = {**STEPS, **still(tiny("florence2")), "model.freeze": ["vision", "encoder"]}
    out = run(tiny("florence2"), "default", pairs, tmp_path / "run", more=more)
    recorded = json.loads((out.directory / "training.json").read_text())["trainable"]
    assert [recorded[part][0] for part in ("vision", "encoder")] == [0, 0]
    assert recorded["decoder"][0] == recorded["decoder"][1] > 0
