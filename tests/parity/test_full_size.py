"""No false alarm at full size: Florence-2-large, OFA-large and a BLIP-2 of 7.8 billion parameters with weights of a
formula, our float32 against our own float64. A model that is right may not depart, neither by the depth formula nor by
the measured noise; and judging the largest in float64 takes less than 8 GB."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    OPTConfig,
    ResNetConfig,
)
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from weightport.api import check_parity, load_native
from weightport.checkpoints.types import TensorRef
from weightport.families.registry import registry
from weightport.modeling.ofa.configuration_ofa import OFAConfig
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration
from weightport.parity import Run, Verdict, write_reference
from weightport.parity.float64_arithmetic import Float64Throughout
from weightport.parity.runner import native_arguments
from weightport.parity.seams import _submodule
from weightport.parity.selection import Selection

KEPT = 50_000
"""About so many values are kept of a seam, evenly spread."""


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


FILLED_LAYERS = 4
"""Layers of the 7B text model that have values. The rest of it is a hole in a sparse file, hence zero: what a weight
costs in memory does not depend on its values, and the drill needs 5 GB of disk instead of 16."""


def blip2_opt_7b() -> tuple[Any, Blip2Config]:
    text = OPTConfig(
        vocab_size=50304, hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32,
        word_embed_proj_dim=4096,
    )  # fmt: skip
    return Blip2ForConditionalGeneration, Blip2Config(text_config=text.to_dict(), image_token_index=50265)


def left_empty(name: str) -> bool:
    layer = re.match(r"language_model\.model\.decoder\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= FILLED_LAYERS


def build(model_class: Any, config: Any, directory: Path) -> Path:
    """The model's directory in float16, every weight by its formula, written tensor by tensor."""
    with torch.device("meta"):
        model = model_class(config)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: each for name, each in model.state_dict().items() if name not in tied}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, each in shapes.items():
        dtype, width = ("F16", 2) if each.is_floating_point() else ("I64", 8)
        begin, end = end, end + each.numel() * width
        header[name] = {"dtype": dtype, "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config.architectures = [model_class.__name__]
    config.dtype = torch.float16
    config.save_pretrained(directory)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, each in shapes.items():
            if each.is_floating_point() and not left_empty(name):
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(golden.fill(name, tuple(each.shape)).astype("float16").tobytes())
    return directory


def pixels(name: str, size: int) -> torch.Tensor:
    """Values between -2 and 2, as normalised pictures have them, [1, 3, size, size]."""
    return (4 * torch.from_numpy(golden.fill(f"input.{name}", (3 * size * size,))) - 4).reshape(1, 3, size, size)


INPUTS = {
    "florence2": {
        "input_ids": torch.tensor([[0, 2264, 473, 5, 2274, 6190, 116, 2]]),
        "decoder_input_ids": torch.tensor([[2, 0, 250, 2335, 9, 10]]),
        "pixel_values": pixels("pixel_values", 768),
    },
    "ofa": {
        "src_tokens": torch.tensor([[0, 99, 473, 5, 2274, 6190, 116, 2]]),
        "prev_output_tokens": torch.tensor([[0, 250, 2335, 9, 10, 77]]),
        "patch_images": pixels("patch_images", 480),
        "patch_masks": torch.tensor([True]),
    },
    "blip2": {
        "image": pixels("image", 224),
        "input_ids": torch.tensor([[2, 102, 1345, 9, 10, 473]]),
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
    },
}

SIZES = {"florence2": florence2_large, "ofa": ofa_large, "blip2": blip2_opt_7b}
SEAMS = {
    "florence2": [
        *(f"vision.stages.{stage}" for stage in range(4)),
        "projector",
        "encoder.embeddings",
        *(f"{stack}.layers.{layer}" for stack in ("encoder", "decoder") for layer in (0, 5, 11)),
        "encoder",
        "logits",
    ],
    "ofa": [
        "vision",
        "projector",
        "encoder.embeddings",
        *(f"{stack}.layers.{layer}" for stack in ("encoder", "decoder") for layer in (0, 5, 11)),
        "encoder",
        "logits",
    ],
    "blip2": [
        *(f"vision.layers.{layer}" for layer in (0, 19, 38)),
        "vision",
        "vision.norm",
        *(f"qformer.layers.{layer}" for layer in (0, 11)),
        "qformer",
        "projector",
        *(f"decoder.layers.{layer}" for layer in (0, 3, 31)),
        "logits",
    ],
}


def computed(directory: Path, family: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, Selection]]:
    """What our own model gives at the seams, by eager attention, as `forward/out/<seam>` names it, and which values
    of the seam these are."""
    table, suffix = registry()[family].parity, "@float64" if dtype == torch.float64 else ""
    model = load_native(directory, dtype, attn_implementation="eager", stream=True)
    inputs = {
        name: TensorRef.of(name, tuple(t.shape), t.dtype, partial(lambda t: t, t))
        for name, t in INPUTS[family].items()
    }
    found: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        if table.correction:
            table.correction.apply(model)
        if table.casts_to_float32 and dtype == torch.float64:
            hooks.enter_context(Float64Throughout())
        for name in SEAMS[family]:
            seam, layer = next((s, n) for s in table.seams if (n := s.layer_of(name)) is not None)

            def keep(module, args, kwargs, output=None, name=name, seam=seam) -> None:
                value = output if seam.side == "output" else args[0] if args else kwargs["hidden_states"]
                found.setdefault(name, seam.pick(value).reshape(-1))

            module = _submodule(model, seam.module.replace("*", layer))
            attach = module.register_forward_hook if seam.side == "output" else module.register_forward_pre_hook
            hooks.callback(attach(keep, with_kwargs=True).remove)
        model(**native_arguments(table, Run("forward", "forward", inputs, ()), model), use_cache=False)
    for name, value in found.items():
        step = max(1, value.numel() // KEPT)
        yield f"forward/out/{name}{suffix}", value[::step].clone(), Selection(flat=slice(0, value.numel(), step))


class PeakMemory:
    """The most anonymous memory of this process in its block, sampled every 50 ms. Mapped weights are none."""

    def __enter__(self) -> PeakMemory:
        self.anonymous, self.seconds, self._done = 0, time.monotonic(), threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.anonymous = max(
                self.anonymous, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
            )

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._sampler.join()
        self.seconds = time.monotonic() - self.seconds


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_right_model_of_full_size_does_not_depart(family: str, tmp_path: Path) -> None:
    directory = build(*SIZES[family](), tmp_path)
    exact, single = (list(computed(directory, family, dtype)) for dtype in (torch.float64, torch.float32))
    given = {f"forward/in/{name}": value for name, value in INPUTS[family].items()}
    for held, dtypes in ((exact, [torch.float32]), (exact + single, [torch.float32, torch.float64])):
        path = write_reference(
            tmp_path / "reference.safetensors", family, {"project": "weightport, eager attention"},
            {"forward": {"kind": "forward"}}, given | {name: value for name, value, _ in held},
            {name: kept for name, _, kept in held},
        )  # fmt: skip
        with PeakMemory() as peak:
            report = check_parity(directory, path, dtypes=dtypes, attn_implementation="sdpa")
        print(f"{family} in {dtypes}: {peak.seconds:.0f} s, {peak.anonymous / 1e9:.2f} GB anonymous")
        for each in report.comparisons:
            own = f"{each.relative_own:.1e}" if each.relative_own is not None else "-"
            errors = f"{each.relative:.1e} own {own} allowed {each.relative_allowed:.1e}"
            print(f"{family} {each.seam} {each.dtype}/{each.against} {errors}")
        assert peak.anonymous < 8e9
        assert report.passed and not report.passing, report.verdict
        assert {each.verdict for each in report.comparisons} <= {Verdict.AGREES, Verdict.WITHIN_NOISE}
