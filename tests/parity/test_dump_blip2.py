"""dump_blip2.py against a small LAVIS with its habits: rounded weights, casts, loaders that say nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from original_stand_ins import imports_undone, script
from PIL import Image
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from weightport.parity import read_reference

STAND_INS = Path(__file__).parent / "stand_ins"
OPT = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 12,
       "max_position_embeddings": 40, "word_embed_proj_dim": 8, "dropout": 0.0}  # fmt: skip


@pytest.fixture
def sources(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes checkpoint, vision file and language model; `sources(change)` may edit the first two before."""

    def written(change=lambda weights, vision: None, *, itm: bool = False, size: int = 4) -> list[str]:
        torch.manual_seed(0)
        vision = {"patch_embed.weight": torch.randn(6, 3, 2, 2), "patch_embed.bias": torch.randn(6),
                  "pos_embed": torch.randn(1, 4, 6), "norm.weight": torch.ones(6)}  # fmt: skip
        linears = {f"blocks.{n}.fc": (6, 6) for n in range(2)}
        weights = {"query_tokens": torch.randn(1, 3, 6), "ln_vision.weight": torch.rand(6) + 0.5,
                   "ln_vision.bias": torch.randn(6)}  # fmt: skip
        trained = {f"Qformer.bert.encoder.layer.{n}": (6, 6) for n in range(2)}
        trained |= {"itm_head": (2, 6)} if itm else {"opt_proj": (8, 6)}
        for place, shapes in ((vision, linears), (weights, trained)):
            for name, shape in shapes.items():
                place |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
        if itm:
            weights["Qformer.bert.words.weight"] = torch.randn(20, 6)
        else:
            weights["opt_model.lm_head.weight"] = torch.zeros(16, 8, dtype=torch.float16)
        change(weights, vision)
        config = {"model": {"vit_model": "eva_clip_g", "image_size": size}}
        torch.save({"model": weights, "optimizer": {}, "config": config}, tmp_path / "checkpoint_1.pth")
        torch.save(vision, tmp_path / "eva_vit_g.pth")
        OPTForCausalLM(OPTConfig(**OPT)).save_pretrained(tmp_path / "llm")
        language = [] if itm else ["--llm", str(tmp_path / "llm")]
        return [str(tmp_path / "checkpoint_1.pth"), "--vit", str(tmp_path / "eva_vit_g.pth"), *language]

    return written


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Runs the script as a user does; the reference's path, or SystemExit with what it says."""
    Image.new("RGB", (9, 7), (40, 200, 90)).save(tmp_path / "i.png")
    out = tmp_path / "reference.safetensors"

    def generate(self, inputs_embeds, attention_mask, num_beams, max_length):
        return torch.tensor([[2, 5, 6, 7][:max_length]] * len(inputs_embeds))

    monkeypatch.setattr(OPTForCausalLM, "generate", generate)

    def dumped(given: list[str], *options: str, texts=("a dog", "cats")) -> Path:
        asked = [each for text in texts for each in ("--image", str(tmp_path / "i.png"), "--text", text)]
        monkeypatch.setattr(sys, "argv", ["dump_blip2.py", given[0], str(out), "--repo", str(STAND_INS), *given[1:],
                                          *asked, "--stand-in", "iopath_of_lavis", *options])  # fmt: skip
        script("dump_blip2").main()
        return out

    with imports_undone():
        yield dumped


def tensors(path: Path) -> dict[str, torch.Tensor]:
    runs = read_reference(path).runs
    found = {each.tensor.name: each.tensor.read() for run in runs for each in run.outputs}
    return found | {ref.name: ref.read() for run in runs for ref in run.inputs.values()}


def test_dump_is_a_reference_with_every_seam_in_both_precisions(run, sources) -> None:
    written = run(sources())
    found, reference = tensors(written), read_reference(written)
    assert {each.kind for each in reference.runs} == {"forward", "train", "generate"}
    seams = {"vision", "vision.layers.0", "vision.layers.1", "vision.norm", "qformer", "qformer.layers.1", "projector",
             "decoder.layers.0", "decoder.layers.1", "logits"}  # fmt: skip
    assert seams <= {name.partition("/out/")[2] for name in found}
    for seam in seams:
        near, exact = found[f"forward/out/{seam}"], found[f"forward/out/{seam}@float64"]
        torch.testing.assert_close(near.double(), exact, rtol=1e-4, atol=1e-5)


def test_arguments_are_those_of_the_text_alone_and_the_labels_of_all(run, sources) -> None:
    found = tensors(run(sources()))
    assert found["forward/in/input_ids"].shape == found["forward/in/attention_mask"].shape == (2, 5)
    assert found["forward/in/attention_mask"].tolist()[1] == [1, 1, 1, 1, 0]
    assert found["train/in/labels"].shape == (2, 3 + 5)
    assert found["beam/in/attention_mask"].shape == found["beam/in/input_ids"].shape == (2, len("a photo of"))


def test_placeholder_before_generated_ids_is_left_out_and_not_counted(run, sources) -> None:
    written = run(sources(), "--max-length", "4")
    assert tensors(written)["greedy/out/sequences"].tolist() == [[[5, 6, 7]]] * 2
    options = next(each.options for each in read_reference(written).runs if each.name == "greedy")
    assert options["max_new_tokens"] == 3


def test_language_model_is_the_folders_and_not_rounded_to_half(run, sources) -> None:
    exact = tensors(run(sources()))["forward/out/logits"].clone()
    written = run(sources(), "--rounded")
    assert read_reference(written).source["language model"] == "as LAVIS rounds it"
    rounded = tensors(written)["forward/out/logits"]
    assert 1e-6 < float((exact - rounded).abs().max()) < 1e-1


def test_float64_run_is_one_although_layer_norms_cast(run, sources) -> None:
    found = tensors(run(sources()))
    vision, norm = found["forward/out/vision@float64"], found["forward/out/vision.norm@float64"]
    stored = torch.load(Path(sources()[0]))["model"]
    weight, bias = stored["ln_vision.weight"].double(), stored["ln_vision.bias"].double()
    expected = nn.functional.layer_norm(vision, (6,), weight, bias, 1e-5)
    torch.testing.assert_close(norm, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, v: w.pop("Qformer.bert.encoder.layer.1.bias"), r"has no Qformer\.bert\.encoder\.layer\.1\.bias"),
        (lambda w, v: v.pop("blocks.1.fc.weight"), r"has no visual_encoder\.blocks\.1\.fc\.weight"),
        (lambda w, v: w.update({"Qformer.extra": torch.ones(1)}), r"no place for Qformer\.extra"),
        (lambda w, v: w.pop("opt_proj.weight"), "no BLIP-2 of OPT, T5 or stage 1"),
        (lambda w, v: w["query_tokens"].fill_(float("nan")), "NaN in query_tokens"),
    ],
)
def test_sources_that_do_not_fit_are_refused(run, sources, change, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        run(sources(change))
    assert not list(tmp_path.glob("reference*"))


def test_position_table_of_another_size_is_resized_as_the_original_does(run, sources) -> None:
    assert tensors(run(sources(size=6)))["forward/out/vision"].shape == (2, 9, 6)


def test_stage_1_checkpoint_gives_both_heads(run, sources) -> None:
    found = tensors(run(sources(itm=True), texts=("cats", "dogs")))
    assert found["itm/out/itm"].shape == (2, 2) and found["itc/out/itc_pairs@float64"].dtype == torch.float64
    assert found["itm/in/input_ids"].shape == found["itm/in/attention_mask"].shape == (2, 4)


def test_language_model_has_to_be_named(run, sources) -> None:
    with pytest.raises(SystemExit, match="--llm: the folder of the language model"):
        run([each for each in sources() if "llm" not in each])


def test_half_precision_at_a_seam_is_refused() -> None:
    dump = script("dump_blip2")

    class Half(nn.Module):
        def forward(self, x):
            return x.to(torch.bfloat16)

    recorder, module = object.__new__(dump.Recorder), Half()
    recorder.values, recorder.undo = {}, []
    recorder.hook(module, "vision")
    with pytest.raises(dump.DumpError, match=r"vision is torch\.bfloat16: the original runs in autocast"):
        module(torch.ones(1))
