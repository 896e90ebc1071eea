#!/usr/bin/env python3
"""What converting BLIP-2 costs: `port-blip2` on three sources of OPT-2.7b's widths, against `cp` of all three and
against the straightforward way.

    python benchmarks/convert_blip2.py               ViT-g with 39 blocks, OPT with 32 layers: 7.7 GB of sources
    python benchmarks/convert_blip2.py --layers 4    4 of each, to try

Sources have random values in float16 (vision encoder, language model) and float32 (trained parts). One run makes them,
then times whole processes in turn. Memory is explained in processes.py. The straightforward way is torch.load of all
three, rename, load_state_dict, save_pretrained.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import Figures, Timing, save, timed

VISION, QFORMER, TEXT = 1408, 768, 2560
START = "import torch, transformers.modeling_utils"


def language_config(layers: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": TEXT, "word_embed_proj_dim": TEXT,
        "ffn_dim": 4 * TEXT, "num_hidden_layers": layers, "num_attention_heads": 32, "vocab_size": 50272,
        "max_position_embeddings": 2048, "do_layer_norm_before": True, "activation_function": "relu",
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


def write_sources(folder: Path, blocks: int, layers: int) -> None:
    """blip2.pth, eva_vit_g.pth and llm/ in `folder`, with so many blocks of the vision encoder and layers of OPT."""
    import torch

    def made(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shape, dtype=dtype).uniform_(-0.02, 0.02) for name, shape in shapes.items()}

    def linear(name: str, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    vision: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, VISION), "pos_embed": (1, 257, VISION), "patch_embed.proj.weight": (VISION, 3, 14, 14),
        "patch_embed.proj.bias": (VISION,),
    }  # fmt: skip
    for number in range(blocks + 1):
        block = f"blocks.{number}"
        vision |= {f"{block}.attn.q_bias": (VISION,), f"{block}.attn.v_bias": (VISION,)}
        vision |= {f"{block}.attn.qkv.weight": (3 * VISION, VISION)} | linear(f"{block}.attn.proj", VISION, VISION)
        vision |= linear(f"{block}.mlp.fc1", 6144, VISION) | linear(f"{block}.mlp.fc2", VISION, 6144)
        vision |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
    torch.save(made(vision, torch.float16), folder / "eva_vit_g.pth")

    trained: dict[str, tuple[int, ...]] = {"query_tokens": (1, 32, QFORMER)} | norm("ln_vision", VISION)
    trained |= norm("Qformer.bert.embeddings.LayerNorm", QFORMER) | linear("opt_proj", TEXT, QFORMER)
    for number in range(12):
        layer = f"Qformer.bert.encoder.layer.{number}"
        for attention in ("attention", "crossattention")[: 2 if number % 2 == 0 else 1]:
            seen = VISION if attention == "crossattention" else QFORMER
            trained |= linear(f"{layer}.{attention}.self.query", QFORMER, QFORMER)
            trained |= linear(f"{layer}.{attention}.self.key", QFORMER, seen)
            trained |= linear(f"{layer}.{attention}.self.value", QFORMER, seen)
            trained |= linear(f"{layer}.{attention}.output.dense", QFORMER, QFORMER)
            trained |= norm(f"{layer}.{attention}.output.LayerNorm", QFORMER)
        trained |= linear(f"{layer}.intermediate_query.dense", 4 * QFORMER, QFORMER)
        trained |= linear(f"{layer}.output_query.dense", QFORMER, 4 * QFORMER)
        trained |= norm(f"{layer}.output_query.LayerNorm", QFORMER)
    torch.save({"model": made(trained, torch.float32)}, folder / "blip2.pth")

    text: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (50272, TEXT), "model.decoder.embed_positions.weight": (2050, TEXT),
    } | norm("model.decoder.final_layer_norm", TEXT)  # fmt: skip
    for number in range(layers):
        layer = f"model.decoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            text |= linear(f"{layer}.self_attn.{part}", TEXT, TEXT)
        text |= linear(f"{layer}.fc1", 4 * TEXT, TEXT) | linear(f"{layer}.fc2", TEXT, 4 * TEXT)
        text |= norm(f"{layer}.self_attn_layer_norm", TEXT) | norm(f"{layer}.final_layer_norm", TEXT)
    (folder / "llm").mkdir()
    torch.save(made(text, torch.float16), folder / "llm" / "pytorch_model.bin")
    (folder / "llm" / "config.json").write_text(json.dumps(language_config(layers)))


def straightforward(folder: Path, out: Path) -> None:
    """All three in memory, renamed by the family's own table, loaded into the model and saved."""
    import torch
    from transformers import AutoModelForImageTextToText

    from weightport.api import plan_conversion

    sources = {"checkpoint": folder / "blip2.pth", "vision": folder / "eva_vit_g.pth", "llm": folder / "llm"}
    planned = plan_conversion(sources, "blip2", vocabulary="none")
    model = AutoModelForImageTextToText.from_config(planned.model.config)
    whole = [torch.load(path, weights_only=True) for path in (sources["checkpoint"], sources["vision"])]
    whole.append(torch.load(folder / "llm" / "pytorch_model.bin", weights_only=True))
    state = {target.name: torch.cat(list(target.blocks())).reshape(target.shape) for target in planned.plan.targets}
    model.load_state_dict(state, strict=False)
    model.save_pretrained(out, max_shard_size="100GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="blocks of the vision encoder and layers of OPT (default: 39, 32)")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each command")
    parser.add_argument("--folder", type=Path, help="where to work; needs 4 times the sources' size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--straightforward", nargs=2, type=Path, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.straightforward:
        straightforward(*arguments.straightforward)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_sources(folder, arguments.layers or 39, arguments.layers or 32)
        files = [folder / "blip2.pth", folder / "eva_vit_g.pth", folder / "llm" / "pytorch_model.bin"]
        port, naive, copy = (folder / part for part in ("port", "naive", "copy"))
        command = ["-c", "from weightport.cli import port_blip2; port_blip2()"]
        commands = {
            "port-blip2": [
                sys.executable, *command, str(files[0]), str(port), "--llm", str(folder / "llm"), "--vision",
                str(files[1]), "--vocab", "none", "--max-shard-size", "100GB", "--quiet", "--overwrite",
            ],
            "cp of all three": ["cp", *map(str, files), str(copy)],
            "interpreter start": [sys.executable, "-c", START],
            "straightforward": [sys.executable, __file__, "--straightforward", str(folder), str(naive)],
        }  # fmt: skip
        timings: dict[str, list[Timing]] = {label: [] for label in commands}
        for _ in range(arguments.runs):
            for label, each in commands.items():
                shutil.rmtree(copy, ignore_errors=True)
                shutil.rmtree(naive, ignore_errors=True)
                copy.mkdir()
                timings[label].append(timed(each))
        read = sum(file.stat().st_size for file in files)
        report(timings, read)
        title = f"Converting blip2, {read / 1e9:.1f} GB read"
        copy_and_start = {"copy": "cp of all three", "start": "interpreter start"}
        save(arguments.json, [Figures.of(title, timings, "port-blip2", "straightforward", **copy_and_start)])


def report(timings: dict[str, list[Timing]], read: int) -> None:
    """Print medians and ratios."""
    seconds = {label: statistics.median(t.seconds for t in runs) for label, runs in timings.items()}
    memory = {label: statistics.median(t.megabytes for t in runs) for label, runs in timings.items()}
    print(f"sources {read / 1e9:.2f} GB")
    for label in timings:
        print(f"{label:<18} {seconds[label]:7.2f} s   {memory[label]:7.0f} MB private memory at its peak")
    own = seconds["port-blip2"] - seconds["interpreter start"]
    print(f"(port-blip2 − interpreter start) / cp   {own / seconds['cp of all three']:5.2f}")
    print(f"straightforward / port-blip2            {seconds['straightforward'] / seconds['port-blip2']:5.2f}")
    print(f"memory: straightforward / port-blip2    {memory['straightforward'] / memory['port-blip2']:5.2f}")


if __name__ == "__main__":
    main()
