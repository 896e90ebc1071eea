"""dump_florence2.py against stand-ins that behave as the remote code under transformers 4.41 was seen to behave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from original_stand_ins import (
    SOURCE,
    TARGET,
    StandInFlorence2,
    ids,
    script,
    zeroes_gradients_in_place,
)
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from weightport.parity import read_reference

SHARED, HEAD = "language_model.model.shared.weight", "language_model.lm_head.weight"
ALIASES = [f"language_model.model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]


class RemoteModel(StandInFlorence2):
    """Loads as the remote code does: the head is untied whatever the file says, and uninitialised where it is absent.
    Its logits end in float32, as the remote code's do."""

    def __init__(self, config) -> None:
        super().__init__()
        assert config.vision_config.model_type == "davit", "only DaViT is supported for now"
        nn.init.constant_(self.language_model.lm_head.weight, float("nan"))

    @classmethod
    def from_pretrained(cls, folder, config, torch_dtype, attn_implementation):
        model = cls(config)
        stored = script("dump_florence2").stored_weights(folder)
        model.load_state_dict({**model.state_dict(), **{key: value.float() for key, value in stored.items()}})
        return model

    def forward(self, input_ids, pixel_values=None, decoder_input_ids=None, labels=None):
        output = super().forward(input_ids, decoder_input_ids, labels)
        logits = output.logits.float()
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)

    def generate(self, input_ids, pixel_values=None, **settings):
        return input_ids


class RemoteConfig:
    @classmethod
    def from_pretrained(cls, folder):
        stated = json.loads((Path(folder) / "config.json").read_text())
        return SimpleNamespace(vision_config=SimpleNamespace(**stated["vision_config"]))


class RemoteProcessor:
    """Ids and image size are those of the folder it is read from."""

    def __init__(self, shift: int, size: int) -> None:
        self.shift, self.size = shift, size
        self.tokenizer = lambda texts, **settings: SimpleNamespace(input_ids=(ids(TARGET) + shift)[: len(texts)])

    @classmethod
    def from_pretrained(cls, folder):
        settings = Path(folder) / "preprocessor_config.json"
        if not settings.is_file():
            raise OSError(f"{folder} does not appear to have a file named preprocessor_config.json")
        return cls(**json.loads(settings.read_text()))

    def __call__(self, text, images, **settings):
        pixels = torch.zeros(len(images), 3, self.size, self.size)
        return {"input_ids": ids(SOURCE)[: len(text)] + self.shift, "pixel_values": pixels}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint's folder: `checkpoint(change, **settings)`; the head is tied, under all four names."""

    def written(change=lambda stored: None, *, model_type="davit", binary=False, processor=True) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        stored = {name: tensor.clone() for name, tensor in StandInFlorence2().state_dict().items()}
        stored |= {name: stored[SHARED].clone() for name in (HEAD, *ALIASES)}
        change(stored)
        if binary:
            torch.save(stored, folder / "pytorch_model.bin")
        else:
            save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"vision_config": {"model_type": model_type}}))
        if processor:
            (folder / "preprocessor_config.json").write_text(json.dumps({"shift": 0, "size": 4}))
        return folder

    return written


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Callable[..., Path]:
    """Runs the script as a user does; the reference's path, or SystemExit with what it says."""
    classes = {"Florence2ForConditionalGeneration": RemoteModel, "Florence2Config": RemoteConfig,
               "Florence2Processor": RemoteProcessor}  # fmt: skip
    dynamic = SimpleNamespace(
        get_imports=lambda filename: ["torch", "flash_attn"],
        get_class_from_dynamic_module=lambda name, folder: classes[name.rpartition(".")[2]],
    )
    monkeypatch.setattr(transformers, "dynamic_module_utils", dynamic)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "register", lambda *args, **kwargs: None)
    Image.new("RGB", (5, 4)).save(tmp_path / "i.png")
    code, out = tmp_path / "code", tmp_path / "reference.safetensors"
    code.mkdir()
    (code / "preprocessor_config.json").write_text(json.dumps({"shift": 1, "size": 7}))

    def dumped(folder: Path, *options: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["dump_florence2.py", str(folder), str(out), "--repo", str(code), "--image",
                                          str(tmp_path / "i.png"), "--prompt", "<CAPTION>", *options])  # fmt: skip
        script("dump_florence2").main()
        return out

    return dumped


def tensors(path: Path) -> dict[str, torch.Tensor]:
    runs = read_reference(path).runs
    found = {each.tensor.name: each.tensor.read() for run in runs for each in run.outputs}
    return found | {ref.name: ref.read() for run in runs for ref in run.inputs.values()}


def test_import_check_no_longer_asks_for_flash_attn() -> None:
    dump = script("dump_florence2")

    def check_imports(filename):
        missing = [name for name in dynamic.get_imports(filename) if name == "flash_attn"]
        if missing:
            raise ImportError("This modeling file requires the following packages that were not found: flash_attn")

    dynamic = SimpleNamespace(get_imports=lambda filename: ["einops", "flash_attn", "timm"])
    with pytest.raises(ImportError, match="flash_attn"):
        check_imports("modeling_florence2.py")
    dump.without_flash_attention(dynamic)
    check_imports("modeling_florence2.py")
    assert dynamic.get_imports("modeling_florence2.py") == ["einops", "timm"]


@pytest.mark.parametrize("binary", [False, True])
def test_tied_checkpoint_gives_both_names_the_sum_of_their_gradients(run, checkpoint, binary: bool) -> None:
    written = run(checkpoint(binary=binary))
    found = tensors(written)
    assert read_reference(written).source["lm_head"] == "tied"
    torch.manual_seed(0)
    model = StandInFlorence2()
    model.language_model.lm_head.weight = model.language_model.model.shared.weight
    model(ids(SOURCE)[:1], labels=ids(TARGET)[:1]).loss.backward()
    expected = float(model.language_model.model.shared.weight.grad.double().norm())
    for name in (SHARED, HEAD):
        for suffix, close in (("", 1e-6), ("@float64", 1e-6)):
            assert float(found[f"train/out/grad_norm.{name}{suffix}"]) == pytest.approx(expected, rel=close)


def test_file_without_a_head_is_tied_and_not_left_at_random(run, checkpoint) -> None:
    whole = tensors(run(checkpoint()))
    found = tensors(run(checkpoint(lambda stored: stored.pop(HEAD))))
    assert torch.equal(found["forward/out/logits"], whole["forward/out/logits"])


def test_file_with_one_of_the_four_names_is_tied_to_it(run, checkpoint) -> None:
    whole = tensors(run(checkpoint()))
    found = tensors(run(checkpoint(lambda stored: [stored.pop(name) for name in (SHARED, HEAD, ALIASES[0])])))
    assert torch.equal(found["forward/out/logits"], whole["forward/out/logits"])


def test_head_of_its_own_stays_one(run, checkpoint) -> None:
    written = run(checkpoint(lambda stored: stored[HEAD].mul_(2)))
    found = tensors(written)
    assert read_reference(written).source["lm_head"] == "a matrix of its own"
    norms = [float(found[f"train/out/grad_norm.{name}"]) for name in (SHARED, HEAD)]
    assert norms[0] != norms[1]


def test_missing_key_is_refused(run, checkpoint, tmp_path: Path) -> None:
    name = "language_model.model.encoder.layers.0.fc1.bias"
    with pytest.raises(SystemExit, match=f"the checkpoint has no {name}"):
        run(checkpoint(lambda stored: stored.pop(name)))
    assert not list(tmp_path.glob("reference.safetensors*"))


def test_checkpoint_without_any_embedding_is_refused(run, checkpoint) -> None:
    with pytest.raises(SystemExit, match=f"the checkpoint has no {SHARED}"):
        run(checkpoint(lambda stored: [stored.pop(name) for name in (SHARED, HEAD, *ALIASES)]))


def test_float64_logits_are_float64_although_the_remote_code_ends_in_float(run, checkpoint) -> None:
    found = tensors(run(checkpoint()))
    logits = found["forward/out/logits@float64"]
    assert logits.dtype == torch.float64 and not torch.equal(logits, logits.float().double())
    torch.testing.assert_close(logits, found["forward/out/logits"].double(), rtol=0, atol=1e-5)


def test_processor_is_the_checkpoints_and_not_the_codes(run, checkpoint) -> None:
    found = tensors(run(checkpoint()))
    assert found["forward/in/pixel_values"].shape == (1, 3, 4, 4)
    assert torch.equal(found["forward/in/input_ids"], ids(SOURCE)[:1])


def test_checkpoint_without_a_processor_asks_for_one(run, checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(processor=False)
    with pytest.raises(SystemExit, match=r"holds no processor(.|\n)*--processor"):
        run(folder)
    found = tensors(run(folder, "--processor", str(tmp_path / "code"), "--no-float64"))
    assert found["forward/in/pixel_values"].shape == (1, 3, 7, 7)


@pytest.mark.parametrize("model_type", ["", None, "davit"])
def test_resaved_fork_whose_vision_type_is_empty_loads(run, checkpoint, model_type) -> None:
    assert run(checkpoint(model_type=model_type)).is_file()


def test_folder_without_weights_is_refused(run, checkpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="holds neither model"):
        run(folder)


def test_nan_in_the_outputs_writes_no_reference(run, checkpoint, tmp_path: Path, monkeypatch) -> None:
    of_linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: of_linear(self, x) * np.nan)
    with pytest.raises(SystemExit, match="NaN"):
        run(checkpoint())
    assert not list(tmp_path.glob("reference.safetensors*"))


class WithProjection(StandInFlorence2):
    """With a parameter whose whole gradient a reference holds."""

    def __init__(self) -> None:
        super().__init__()
        self.image_projection = nn.Parameter(torch.ones(8))

    def forward(self, input_ids, labels):
        output = super().forward(input_ids, labels=labels)
        return SimpleNamespace(loss=output.loss * self.image_projection.sum())


def test_whole_gradient_is_not_the_zeros_that_zero_grad_leaves() -> None:
    model = zeroes_gradients_in_place(WithProjection())
    found = script("dump_florence2").train(model, {"input_ids": ids(SOURCE), "labels": ids(TARGET)})
    assert found["train/out/grad.image_projection"].all()
    assert all(np.asarray(array).any() for name, array in found.items() if "grad" in name)
