"""Checkpoints of any size whose values are holes: kilobytes of disk, and every header, index and directory real."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import safetensors_header

Shapes = Mapping[str, tuple[int, ...]]


def write_safetensors(path: Path, shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> int:
    """A safetensors file of tensors of zeros; returns its bytes."""
    outgoing = [Outgoing(name, shape, dtype, lambda: iter(())) for name, shape in shapes.items()]
    header = safetensors_header(outgoing)
    total = len(header) + sum(each.nbytes for each in outgoing)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(total)
    return total


def write_sharded(folder: Path, shapes: Shapes, tensors_each: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Shards of `tensors_each` tensors and their index; returns the bytes of all."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(shapes)
    groups = [names[start : start + tensors_each] for start in range(0, len(names), tensors_each)]
    files = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    total = sum(
        write_safetensors(folder / file, {name: shapes[name] for name in group}, dtype)
        for file, group in zip(files, groups)
    )
    weight_map = {name: file for file, group in zip(files, groups) for name in group}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def write_llama(folder: Path, layers: int, rows: int = 128256, tensors_each: int = 24) -> int:
    """A model of Llama 3 70B's widths with `layers` layers and a vocabulary of `rows`, in bfloat16; returns the bytes
    of its weights."""
    folder.mkdir(parents=True)
    config = {**LLAMA_70B, "num_hidden_layers": layers, "vocab_size": rows}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**named, **config}))
    return write_sharded(folder, dict(_llama(config)), tensors_each)


def _llama(config: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (rows, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows_of in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows_of, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (rows, hidden)


def write_adapter(folder: Path, layers: int, rank: int = 16) -> None:
    """A LoRA on the query and value projections of every layer of `write_llama`'s model."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    hidden, narrow = LLAMA_70B["hidden_size"], 1024
    noise = torch.randn(hidden * rank)
    tensors = {}
    for number in range(layers):
        for name, rows in (("q_proj", hidden), ("v_proj", narrow)):
            key = f"base_model.model.model.layers.{number}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = noise[: rank * hidden].reshape(rank, hidden).clone()
            tensors[f"{key}.lora_B.weight"] = noise[: rows * rank].reshape(rows, rank).clone()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _fields(options: Any) -> dict[str, Any]:
    return dict(vars(options)) if hasattr(options, "__dict__") else dict(options.fields)


def write_training_checkpoint(path: Path, layers: int) -> int:
    """A fairseq training checkpoint of OFA-large's widths with `layers` layers a side: model and both moments of Adam
    in float32, as torch.save lays them out. Returns the bytes of the model."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    from weightport.checkpoints import Checkpoint, TensorRef
    from weightport.checkpoints.types import NamedTensors
    from weightport.converters.export import original_tensors
    from weightport.families.registry import registry
    from weightport.modeling.ofa.configuration_ofa import OFAConfig

    family = registry()["ofa"].conversion
    config = OFAConfig(
        vocab_size=30325, d_model=1024, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
        vision_config={
            "model_type": "resnet", "embedding_size": 64, "hidden_sizes": [256, 512, 1024], "depths": [3, 8, 36],
            "layer_type": "bottleneck",
        },
    )  # fmt: skip
    refs = NamedTensors(
        TensorRef.of(name, shape, dtype, lambda shape=shape, dtype=dtype: torch.zeros(shape, dtype=dtype), (name,))
        for name, shape in family.targets(config).shapes.items()
        for dtype in (torch.int64 if name.endswith("num_batches_tracked") else torch.float32,)
    )
    tensors, _ = original_tensors(
        Checkpoint(path, "generated", (), refs), family.rules_of(config, "fairseq"), config, {}
    )
    buffers = ("rp_bucket", "version", "position_idx", "image_position")
    with FakeTensorMode():

        def stored() -> dict[str, torch.Tensor]:
            return {each.name: torch.empty(each.shape, dtype=each.dtype) for each in tensors}

        model = {
            name: tensor
            for name, tensor in stored().items()
            if not any(part in name.rpartition(".")[2] for part in buffers)
        }
        document = family.original_document(config, {"task": {"bpe": "bert"}, "language": "zh"}, model)
        # What stands for the options in a document is written as the class it names.
        document["args"] = Namespace(**_fields(document["args"]))
        moments = {
            number: {"step": 1, "exp_avg": first, "exp_avg_sq": second}
            for number, (first, second) in enumerate(zip(stored().values(), stored().values()))
            if first.dtype.is_floating_point
        }
        document["last_optimizer_state"] = {"state": moments, "param_groups": []}
        with skip_data(materialize_fake_tensors=True):
            torch.save(document, path)
    return sum(each.nbytes for each in tensors)
