"""No false alarm at full size: Florence-2-large and OFA-large with weights of a formula, our float32 against our own
float64. A model that is right may not depart, neither by the depth formula nor by the measured noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import save_file
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, ResNetConfig
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from weightport.api import check_parity, load_native
from weightport.checkpoints.types import TensorRef
from weightport.families.registry import registry
from weightport.modeling.ofa.configuration_ofa import OFAConfig
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration
from weightport.parity import Run, Verdict, write_reference
from weightport.parity.runner import native_arguments
from weightport.parity.seams import _submodule
from weightport.parity.selection import Selection

KEPT = 50_000
"""Values kept of a seam, from its start."""


def florence2_large() -> tuple[Any, Florence2Config]:
    text = BartConfig(
        vocab_size=51289, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, max_position_embeddings=1024,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    vision = Florence2VisionConfig(
        embed_dim=(256, 512, 1024, 2048), depths=(1, 1, 9, 1), num_heads=(8, 16, 32, 64), num_groups=(8, 16, 32, 64),
        projection_dim=1024, max_position_embeddings=50,
    )  # fmt: skip
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=50261, is_encoder_decoder=True,
        tie_word_embeddings=True, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Florence2ForConditionalGeneration, config


def ofa_large() -> tuple[Any, OFAConfig]:
    vision = ResNetConfig(
        depths=[3, 8, 36], hidden_sizes=[256, 512, 1024], embedding_size=64, layer_type="bottleneck",
        out_features=["stage3"],
    )  # fmt: skip
    config = OFAConfig(
        vocab_size=59457, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, vision_config=vision.to_dict(),
    )  # fmt: skip
    return OFAForConditionalGeneration, config


def build(model_class: Any, config: Any, directory: Path) -> Path:
    """The model's directory in float16, every weight by its formula."""
    with torch.device("meta"):
        model = model_class(config)
    tied = set(model.all_tied_weights_keys)
    tensors = {}
    for name, each in model.state_dict().items():
        if name not in tied:
            values = torch.from_numpy(golden.fill(name, tuple(each.shape)))
            tensors[name] = values.half() if each.is_floating_point() else torch.zeros(each.shape, dtype=each.dtype)
    config.architectures = [model_class.__name__]
    config.dtype = torch.float16
    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


INPUTS = {
    "florence2": {
        "input_ids": torch.tensor([[0, 2264, 473, 5, 2274, 6190, 116, 2]]),
        "decoder_input_ids": torch.tensor([[2, 0, 250, 2335, 9, 10]]),
        "pixel_values": 4 * torch.from_numpy(golden.fill("input.pixel_values", (1, 3, 768, 768))) - 4,
    },
    "ofa": {
        "src_tokens": torch.tensor([[0, 99, 473, 5, 2274, 6190, 116, 2]]),
        "prev_output_tokens": torch.tensor([[0, 250, 2335, 9, 10, 77]]),
        "patch_images": 4 * torch.from_numpy(golden.fill("input.patch_images", (1, 3, 480, 480))) - 4,
        "patch_masks": torch.tensor([True]),
    },
}
"""Pixels as bounded as normalised ones."""

SIZES = {"florence2": florence2_large, "ofa": ofa_large}
STAGES = {"florence2": [f"vision.stages.{stage}" for stage in range(4)], "ofa": ["vision"]}


def seams_of(family: str) -> list[str]:
    layers = [f"{stack}.layers.{layer}" for stack in ("encoder", "decoder") for layer in (0, 5, 11)]
    return [*STAGES[family], "projector", "encoder.embeddings", *layers, "encoder", "logits"]


def computed(directory: Path, family: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What our own model gives at the seams, by eager attention, as `forward/out/<seam>` names it."""
    table, suffix = registry()[family].parity, "@float64" if dtype == torch.float64 else ""
    model = load_native(directory, dtype, attn_implementation="eager", stream=True)
    inputs = {
        name: TensorRef(name, tuple(t.shape), t.dtype, partial(lambda t: t, t)) for name, t in INPUTS[family].items()
    }
    found: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name in seams_of(family):
            seam, layer = next((s, n) for s in table.seams if (n := s.layer_of(name)) is not None)

            def keep(module, args, kwargs, output=None, name=name, seam=seam) -> None:
                value = output if seam.side == "output" else args[0] if args else kwargs["hidden_states"]
                found.setdefault(name, seam.pick(value).reshape(-1)[:KEPT].clone())

            module = _submodule(model, seam.module.replace("*", layer))
            attach = module.register_forward_hook if seam.side == "output" else module.register_forward_pre_hook
            hooks.callback(attach(keep, with_kwargs=True).remove)
        model(**native_arguments(table, Run("forward", "forward", inputs, ()), model), use_cache=False)
    yield from ((f"forward/out/{name}{suffix}", value) for name, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_right_model_of_full_size_does_not_depart(family: str, tmp_path: Path) -> None:
    directory = build(*SIZES[family](), tmp_path)
    exact = dict(computed(directory, family, torch.float64))
    single = dict(computed(directory, family, torch.float32))
    given = {f"forward/in/{name}": value for name, value in INPUTS[family].items()}
    for held in (exact, exact | single):
        cut = {name: Selection(flat=slice(0, value.numel(), 1)) for name, value in held.items()}
        path = write_reference(
            tmp_path / "reference.safetensors", family, {"project": "weightport, eager attention"},
            {"forward": {"kind": "forward"}}, given | held, cut,
        )  # fmt: skip
        report = check_parity(directory, path, dtypes=[torch.float32], attn_implementation="sdpa")
        for each in report.comparisons:
            own = f"{each.relative_own:.1e}" if each.relative_own is not None else "-"
            errors = f"{each.relative:.1e} own {own} allowed {each.relative_allowed:.1e}"
            print(f"{family} {each.seam} f32/{each.against} {errors}")
        assert report.passed and not report.passing, report.verdict
        assert {each.verdict for each in report.comparisons} <= {Verdict.AGREES, Verdict.WITHIN_NOISE}
