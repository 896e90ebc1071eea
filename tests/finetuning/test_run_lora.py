"""LoRA runs: the adapter is plain peft's, belongs to its base, and changes nothing that is frozen."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import run, trained_model

from weightport import modeling  # noqa: F401 - registers OFA
from weightport.api import merge_lora
from weightport.errors import OutputError, RecipeError, TrainingError
from weightport.families.registry import registry
from weightport.finetuning.recipes.recipe import shipped_recipes
from weightport.finetuning.setup import preparing
from weightport.finetuning.setup.freezing import Share

STEPS = {
    "model.method": "lora",
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 4,
    "training.max_steps": 4,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}
RUNS = {
    "caption-ofa": ("caption", "ofa", "pairs", {"batch.image_size": 64}),
    "muge-caption-ofa-cn": (
        "muge-caption", "ofa-cn", "muge", {"batch.image_size": 64, "model.freeze": ["vision", "embeddings"]},
    ),
    "docvqa-florence2": ("docvqa", "florence2", "pairs", {}),
    "docvqa-florence2-list": ("docvqa", "florence2", "pairs", {"lora.target_modules": ["q_proj", "k_proj"]}),
}  # fmt: skip


def load(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any, directory: Path, picture: Path) -> torch.Tensor:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(directory)
    inputs = dict(processor(images=Image.open(picture).convert("RGB"), text="what colour?", return_tensors="pt"))
    inputs["decoder_input_ids"] = torch.tensor([[0, 5, 7, 9]])
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", RUNS)
def test_adapter_loads_with_plain_peft_and_merges_to_what_was_trained(
    name: str,
    tiny: Callable[[str], Path],
    pairs: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    recipe, model, data, settings = RUNS[name]
    base, picture = tiny(model), pairs.parent / "0.png"
    trained = trained_model(monkeypatch)
    source = request.getfixturevalue(data)
    out = run(base, recipe, source, tmp_path / "run", more={**STEPS, **settings})
    assert out.directory == tmp_path / "run" / "adapter"
    want = logits(trained[0].float(), base, picture)
    assert (want - logits(load(base), base, picture)).abs().max() > 1e-3, "nothing was learned"

    plain = PeftModel.from_pretrained(load(base), str(out.directory))
    torch.testing.assert_close(logits(plain, base, picture), want, rtol=0, atol=1e-6)

    merge_lora(base, [(out.directory, 1.0)], tmp_path / "merged")
    tolerance = 1e-5 if load_dtype(base) == "float32" else 2e-2
    torch.testing.assert_close(logits(load(tmp_path / "merged"), base, picture), want, rtol=0, atol=tolerance)


def load_dtype(directory: Path) -> str:
    return str(json.loads((directory / "config.json").read_text())["dtype"])


def test_merge_refuses_the_adapter_on_another_base(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    from weightport.errors import AdapterError

    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=STEPS)
    other = tmp_path / "other"
    trained = run(
        tiny("florence2"), "docvqa", pairs, tmp_path / "full",
        more={**STEPS, "model.method": "full", "training.learning_rate": 1e-2},
    )  # fmt: skip
    with pytest.raises(AdapterError, match="trained on a base whose weights have another SHA-256"):
        merge_lora(trained.directory, [(out.directory, 1.0)], other)
    assert not other.exists()


def test_only_the_adapter_is_trained_and_only_it_is_counted(
    tiny: Callable[[str], Path], pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = trained_model(monkeypatch)
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=STEPS)
    base = load(tiny("florence2")).state_dict()
    for name, tensor in trained[0].base_model.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora_" not in name:
            assert torch.equal(tensor.float(), base[plain].float()), f"{plain} has changed"
    recorded = json.loads((out.directory / "training.json").read_text())["trainable"]
    adapter = sum(p.numel() for name, p in trained[0].named_parameters() if "lora_" in name)
    assert sum(count for count, _ in recorded.values()) == adapter
    assert recorded["vision"][0] == 0


REFUSED = {
    "no such module": ({"lora.target_modules": ["quux_proj"]}, r"'quux_proj'.*matches no module.*q_proj"),
    "a frozen tower": (
        {"lora.target_modules": ["qkv", "q_proj"]},
        r"reaches into what is frozen: \d+ modules, such as model\.vision_tower\..*\(vision\)",
    ),
    "all is frozen": ({"model.freeze": ["vision", "language"]}, r"Everything that LoRA changes by default"),
    "a rank of nothing": ({"lora.r": 0}, r"lora: .*r"),
    "no such initialisation": ({"lora.init_lora_weights": "unheard-of"}, r"lora: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_targets_that_cannot_be_are_refused_before_anything_is_written(
    what: str, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(RecipeError, match=message):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, **settings})
    assert not (tmp_path / "run").exists()


def test_frozen_tower_refusal_holds_for_a_regular_expression_and_for_all_linear(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    for targets in (r".*(vision|decoder).*(qkv|q_proj)", "all-linear"):
        with pytest.raises(RecipeError, match="reaches into what is frozen"):
            run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, "lora.target_modules": targets})
    assert not (tmp_path / "run").exists()


def test_qlora_without_bitsandbytes_says_what_to_install(
    tiny: Callable[[str], Path], pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        TrainingError, match=r"(?s)needs bitsandbytes.*pip install bitsandbytes.*--method lora"
    ) as found:
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, "model.method": "qlora"})
    assert found.value.exit_status == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ofa-cn", "ofa", "florence2", "paligemma2"])
def test_qlora_leaves_towers_projectors_and_heads_as_they_are(name: str, tiny: Callable[[str], Path]) -> None:
    """By transformers' own choice of layers, which matches names from their beginning."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    family = registry().of_directory(tiny(name)).training
    linear = [key for key, module in load(tiny(name)).named_modules() if isinstance(module, torch.nn.Linear)]
    for key in linear:
        kept = family.parts.part_of(key) in ("vision", "projector", "head")
        assert should_convert_module(key, list(family.full_precision)) != kept, key
    assert any(should_convert_module(key, list(family.full_precision)) for key in linear)


def test_every_recipe_says_how_lora_is_done() -> None:
    for recipe in shipped_recipes().values():
        assert recipe.lora.get("r") and recipe.lora.get("lora_alpha"), recipe.name


@pytest.mark.parametrize("limit", [1, 3])
def test_disk_check_of_an_adapter_asks_for_the_adapter_and_not_for_the_model(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Florence-2 large with 4 M trained parameters: tens of MB a checkpoint, where the model's would be gigabytes."""
    found = [Share("language", 4_000_000, 823_000_000)]
    arguments: Any = SimpleNamespace(save_strategy="epoch", save_total_limit=limit)
    asked = (limit + 1) * 12 * 4_000_000 + 4 * 4_000_000
    usage = SimpleNamespace(free=asked)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    preparing._require_space(tmp_path, found, arguments, adapter=True)
    with pytest.raises(OutputError, match=f"with {limit + 1} checkpoints needs about"):
        preparing._require_space(tmp_path, found, arguments, adapter=False)
    usage.free = asked - 1
    with pytest.raises(OutputError, match="needs about"):
        preparing._require_space(tmp_path, found, arguments, adapter=True)


def test_checkpoint_and_result_of_an_adapter_hold_no_weights_of_the_base(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    """What the disk check counts with: tensors of the adapter alone, in every file of a run."""
    more = {**STEPS, "training.save_strategy": "steps", "training.save_steps": 2, "batch.image_size": 64}
    out = run(tiny("ofa"), "default", pairs, tmp_path / "run", more=more)
    assert list(out.directory.glob("checkpoint-*")) or list(out.directory.rglob("adapter_model.safetensors"))
    assert {path.name for path in out.directory.rglob("*.safetensors")} == {"adapter_model.safetensors"}
