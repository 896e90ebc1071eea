"""dump_moondream2.py against small models with the names and habits of the revisions of 2024 and 2025."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from original_stand_ins import imports_undone, script
from PIL import Image
from safetensors.torch import save_file

from weightport.families.moondream2.parity import MOONDREAM2
from weightport.parity import read_reference

STAND_INS = Path(__file__).parent / "stand_ins"
QUESTION, ANSWER = "what is", "a coin"


class Words:
    """A tokenizer of 2024 and of 2025: one id a character."""

    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[8 + ord(character) % 30 for character in text])

    def encode(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(ids=self(text).input_ids)


@pytest.fixture(params=["2024", "2025"])
def year(request) -> str:
    return request.param


@pytest.fixture
def run(year: str, tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Writes a checkpoint of that year, which `change` may edit before, and dumps it as a user does."""
    with imports_undone():
        sys.path.insert(0, str(STAND_INS))
        from moondream import revision_2024, revision_2025

        kind = {"2024": revision_2024.Moondream, "2025": revision_2025.HfMoondream}[year]
        dynamic = SimpleNamespace(
            get_imports=lambda filename: ["flash_attn"],
            get_class_from_dynamic_module=lambda name, folder: revision_2024.Config if "Config" in name else kind,
        )
        monkeypatch.setattr(transformers, "dynamic_module_utils", dynamic)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: Words())
        local = SimpleNamespace(from_file=lambda path: Words(), from_pretrained=None)
        monkeypatch.setattr(tokenizers, "Tokenizer", local)
        monkeypatch.setattr(revision_2025, "Tokenizer", local)
        Image.new("RGB", (9, 7), (40, 200, 90)).save(tmp_path / "i.png")
        folder, out = tmp_path / "checkpoint", tmp_path / "reference.safetensors"
        folder.mkdir()
        stated = {"auto_map": {"AutoConfig": "c.Config", "AutoModelForCausalLM": "m.Model"}}
        (folder / "config.json").write_text(json.dumps(stated))

        def dumped(*options: str, change=lambda weights: None) -> Path:
            (folder / "tokenizer.json").write_text("{}")
            monkeypatch.setattr(local, "from_pretrained", lambda name: Words())
            torch.manual_seed(0)
            own = kind(None).state_dict()
            weights = {name: torch.randn(tensor.shape, dtype=torch.float16) for name, tensor in own.items()
                       if not name.endswith("inv_freq")}  # fmt: skip
            change(weights)
            save_file(weights, folder / "model.safetensors")
            monkeypatch.setattr(local, "from_pretrained", None)
            monkeypatch.setattr(sys, "argv", ["dump_moondream2.py", str(folder), str(out), "--image",
                                              str(tmp_path / "i.png"), "--prompt", QUESTION, "--answer", ANSWER,
                                              "--max-new-tokens", "3", "--tokenizer", str(folder / "tokenizer.json"),
                                              *options])  # fmt: skip
            script("dump_moondream2").main()
            return out

        yield dumped


def tensors(path: Path) -> dict[str, torch.Tensor]:
    runs = read_reference(path).runs
    found = {each.tensor.name: each.tensor.read() for run in runs for each in run.outputs}
    return found | {ref.name: ref.read() for run in runs for ref in run.inputs.values()}


def test_dump_is_a_reference_with_every_seam_in_both_precisions(run, year: str) -> None:
    written = run()
    found, reference = tensors(written), read_reference(written)
    assert reference.source["generation"] == year
    assert {each.kind for each in reference.runs} == {"forward", "train", "generate"}
    for seam in ("vision", "vision.layers.0", "vision.layers.1", "projector", "decoder.embeddings", "decoder.layers.0",
                 "decoder.layers.1", "logits"):  # fmt: skip
        near, exact = found[f"forward0/out/{seam}"], found[f"forward0/out/{seam}@float64"]
        assert exact.dtype == torch.float64 and not torch.equal(near.double(), exact), seam
        torch.testing.assert_close(near.double(), exact, rtol=1e-3, atol=1e-3)


def test_layers_are_float64_inside_although_attention_casts(run, year: str) -> None:
    found = tensors(run())
    from moondream import revision_2024

    if year != "2024":
        return
    layer = revision_2024.Layer().double()
    weights = {name.rpartition(".")[2]: tensor for name, tensor in stored(run).items() if ".h.0.Wqkv" in name}
    layer.Wqkv.load_state_dict(weights)
    x = found["forward0/out/decoder.embeddings@float64"]
    q, k, v = layer.Wqkv(x).chunk(3, dim=-1)
    scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
    expected = x + scores.softmax(-1) @ v
    torch.testing.assert_close(found["forward0/out/decoder.layers.0@float64"], expected, rtol=1e-14, atol=1e-13)


def stored(run) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    run(change=lambda weights: kept.update(weights))
    return kept


def test_ids_are_those_that_the_revision_itself_builds(run, year: str) -> None:
    ids = tensors(run())["forward0/in/input_ids"][0].tolist()
    assert ids[:5] == [0, -1, -1, -1, -1]
    if year == "2025":
        assert ids[5:7] == [1, 7] and ids[-2:] == [3, 3]
    else:
        assert len(ids) == 5 + len(f"\n\nQuestion: {QUESTION}\n\nAnswer:")


def test_labels_are_the_answer_and_its_end(run) -> None:
    found = tensors(run())
    labels, ids = found["train0/in/labels"][0], found["train0/in/input_ids"][0]
    kept = labels != -100
    assert int(kept.sum()) == len(" " + ANSWER) + 1 and torch.equal(labels[kept], ids[kept]) and int(labels[-1]) == 0


def test_generated_ids_have_no_start_before_them(run, year: str) -> None:
    found = tensors(run())["greedy0/out/sequences"]
    assert found.shape == (1, 1, 3)
    if year == "2024":
        assert found.tolist() == [[[5, 6, 7]]]


def test_pixels_are_the_originals_own_rounding_in_float32(run, year: str) -> None:
    pixels = tensors(run())["forward0/in/pixel_values"]
    assert pixels.dtype == torch.float32 and pixels.shape == ((1, 3, 4, 4) if year == "2024" else (1, 2, 3, 4, 4))
    half = torch.float16 if year == "2024" else torch.bfloat16
    assert torch.equal(pixels, pixels.to(half).float())


def test_every_value_has_an_axis_of_samples_and_the_arguments_are_those_of_the_table(run, year: str) -> None:
    written = run()
    found = tensors(written)
    assert found["forward0/out/projector"].ndim == found["forward0/out/logits"].ndim == 3
    for each in read_reference(written).runs:
        known = {argument.original for argument in MOONDREAM2.arguments}
        assert set(each.inputs) <= known and {ref.shape[0] for ref in each.inputs.values()} == {1}
        assert ("tiling" in each.inputs) == (year == "2025")


def test_gradients_have_the_files_names(run, year: str) -> None:
    found = tensors(run())
    head = {"2024": "text_model.lm_head.linear.weight", "2025": "model.text.lm_head.weight"}[year]
    assert found[f"train0/out/grad_norm.{head}"] > 0
    assert (f"train0/out/grad.{'text_model.lm_head.ln' if year == '2024' else 'model.text.post_ln'}.weight") in found


def test_prefixless_names_of_the_projects_own_scripts_load(run, year: str) -> None:
    if year == "2024":
        return

    def without(weights: dict) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    assert run(change=without).is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(sorted(weights)[0]), "the checkpoint has no "),
        (lambda weights: weights.update({"x.bias": torch.ones(1)}), r"no place for x\.bias"),
        (lambda weights: weights[sorted(weights)[0]].fill_(float("nan")), "holds NaN in"),
        (lambda weights: weights.update({sorted(weights)[0]: torch.ones(77)}), "other values than the checkpoint"),
    ],
)
def test_checkpoint_that_does_not_fill_the_model_is_refused(run, change, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        run(change=change)
    assert not list(tmp_path.glob("reference*"))
