"""Streamed weights: the bits of a widened model, without its memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

import weightport
from weightport.api import check_parity, load_native
from weightport.parity import runner, streaming, training
from weightport.parity.loading import _narrower
from weightport.parity.streaming import Residence, WideWeight, resident_weights, stream_weights


def tiny_phi(directory: Path, dtype: torch.dtype) -> Path:
    """A model with rotary frequencies, which no file holds, and a tied head, stored in `dtype`."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, partial_rotary_factor=0.5,
    )  # fmt: skip
    PhiForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


def streamed(directory: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = PhiForCausalLM.from_pretrained(directory, dtype="auto").eval()
    stream_weights(model, dtype)
    return model


IDS = torch.tensor([[5, 7, 1, 30], [2, 2, 9, 4]])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_streamed_model_has_the_bits_of_a_widened_one(tmp_path, stored) -> None:
    directory = tiny_phi(tmp_path, stored)
    narrow, wide = streamed(directory), PhiForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    assert narrow.dtype == torch.float64
    for model in (narrow, wide):
        model(IDS, labels=IDS).loss.backward()
    assert torch.equal(narrow(IDS).logits, wide(IDS).logits)
    for (name, one), other in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(narrow.named_buffers(), wide.buffers(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 32])
def test_a_large_head_is_widened_by_blocks(tmp_path, monkeypatch, bias, columns) -> None:
    torch.manual_seed(0)
    model, wide = nn.Linear(16, 32, bias=bias).half(), nn.Linear(16, 32, bias=bias).double()
    wide.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        model._parameters[name] = WideWeight(parameter.detach(), torch.float64, Residence())
    monkeypatch.setattr(streaming, "_BLOCK", columns * 16 * 8)
    widened = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *words: widened.append(self.numel()) or to(self, *words))
    given = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        found = model(given)
    assert max(widened) <= max(columns * 16, 32)
    assert torch.allclose(found, wide(given), rtol=0, atol=1e-14)


def test_weights_stay_as_stored_and_tied_ones_stay_one(tmp_path) -> None:
    model = streamed(tiny_phi(tmp_path, torch.float16))
    assert all(isinstance(each, WideWeight) and each.stored.dtype == torch.float16 for each in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(IDS)
    assert all(each.resident is None for each in model.parameters())


def test_a_wider_file_beside_the_weights_widens_none(tmp_path) -> None:
    directory = tiny_phi(tmp_path, torch.float16)
    save_file({"forward/out/logits@float64": torch.zeros(2, dtype=torch.float64)}, directory / "reference.safetensors")
    assert _narrower(directory, torch.float64) is torch.float16
    assert _narrower(directory, torch.float32) is torch.float16
    assert _narrower(directory, torch.bfloat16) is torch.bfloat16


def test_weights_stay_widened_while_generating_and_only_then(tmp_path) -> None:
    model = streamed(tiny_phi(tmp_path, torch.float16))
    room = 3 * model.model.layers[0].mlp.fc1.weight.numel() * 8
    with resident_weights(model, room):
        model(IDS)
        kept = [each.resident for each in model.parameters() if each.resident is not None]
        assert 0 < sum(each.nbytes for each in kept) <= room
    assert all(each.resident is None for each in model.parameters())


def test_weight_written_in_place_leaves_the_file_alone(tmp_path) -> None:
    directory = tiny_phi(tmp_path, torch.float32)
    before = (directory / "model.safetensors").read_bytes()
    model = streamed(directory)
    weight = model.model.layers[0].mlp.fc1.weight
    value = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1 + 1e-9)
    assert torch.equal(weight.detach().clone(), value * (1 + 1e-9)) and not torch.equal(weight.detach().clone(), value)
    assert (directory / "model.safetensors").read_bytes() == before
    with pytest.raises(RuntimeError, match="view of a streamed weight"), torch.no_grad():
        weight[0].zero_()


def test_parameters_that_a_parent_or_an_index_takes_are_widened() -> None:
    stored = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).half()
    weight = WideWeight(stored, torch.float64, Residence())
    for use in (lambda w: w[1:3], lambda w: w.t() @ w, lambda w: w.view(2, 3, 4).permute(2, 0, 1).sum(0),
                lambda w: torch.cat([w, w]), lambda w: w[torch.tensor([0, 5])], lambda w: torch.stack(w.unbind(1)),
                lambda w: nn.functional.embedding(torch.tensor([1, 1, 4]), w)):  # fmt: skip
        assert torch.equal(use(weight) + 0, use(stored.double()) + 0)


def test_model_of_a_directory_streams_only_where_that_is_wider(native) -> None:
    assert not any(
        isinstance(each, WideWeight) for each in load_native(native, torch.float32, stream=True).parameters()
    )
    assert all(isinstance(each, WideWeight) for each in load_native(native, torch.float64, stream=True).parameters())


def test_training_run_without_memory_is_left_out_by_name_and_nothing_else(native, reference, monkeypatch) -> None:
    monkeypatch.setattr(training, "free_memory", lambda device: 1_000_000)
    chosen = reference("text", "train.eval_eps0.1")
    report = check_parity(native, chosen)
    assert report.passed and len(report.notes) == 1
    assert "run train.eval_eps0.1 in float64" in report.notes[0] and "0.0 GB are free" in report.notes[0]
    assert {each.run for each in report.comparisons if each.dtype == "float64"} == {"text"}
    assert {each.run for each in report.comparisons if each.dtype == "float32"} == {"text", "train.eval_eps0.1"}
    asked = check_parity(native, chosen, dtypes=[torch.float64])
    assert not asked.notes and {each.run for each in asked.comparisons} == {"text", "train.eval_eps0.1"}


def test_memory_that_torch_does_not_get_is_no_fault_of_the_reference(native, reference, monkeypatch) -> None:
    def full(*words: object, **settings: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(runner, "_forward", full)
    with pytest.raises(MemoryError, match=r"run 'text': .*9 bytes"):
        check_parity(native, reference("text"))


def test_every_place_that_loads_a_model_settles_the_arithmetic_first() -> None:
    package = Path(weightport.__file__).parent
    loading = re.compile(r"(AutoModelForImageTextToText|auto_class\)?|model_class)\.from_pretrained\(")
    texts = {path: path.read_text() for path in package.rglob("*.py") if "modeling" not in path.parts}
    found = {path.name: text for path, text in texts.items() if loading.search(text)}
    assert sorted(found) == ["generation.py", "loading.py", "model_loading.py", "verify.py"]
    assert all("settle_arithmetic()" in text for text in found.values())
