"""Small random models of plain transformers architectures, adapters that peft makes for them, and peft as the
judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

V, D, L = 96, 32, 2


def _opt() -> Any:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=D,
            word_embed_proj_dim=D,
            ffn_dim=48,
            num_hidden_layers=L,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=L,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


def _gemma() -> Any:
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=L,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=D, d_kv=8, d_ff=48, num_layers=L, num_heads=4, decoder_start_token_id=0
        )
    )


def _bert() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=L, num_attention_heads=4
        )
    )


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=64)
    )


def _gpt_oss() -> Any:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=L,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
        )
    )


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=V,
            d_model=D,
            encoder_layers=L,
            decoder_layers=L,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        )
    )


def _resnet() -> Any:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    )


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _blip2() -> Any:
    qformer = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": L, "num_attention_heads": 2}
    text = {"model_type": "opt", "vocab_size": V, "hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": 48}
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config=_VISION,
            qformer_config={**qformer, "vocab_size": 50, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
            text_config={**text, "num_hidden_layers": L, "num_attention_heads": 4, "max_position_embeddings": 64},
            num_query_tokens=4,
            image_token_index=V - 1,
        )
    )


def _clip() -> Any:
    text = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": L}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**text, **special, "num_attention_heads": 2, "max_position_embeddings": 32},
            vision_config=_VISION,
            projection_dim=8,
        )
    )


MODELS: Mapping[str, Callable[[], Any]] = {
    "opt": _opt,
    "llama": _llama,
    "gemma": _gemma,
    "t5": _t5,
    "bert": _bert,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "bart": _bart,
    "resnet": _resnet,
    "blip2": _blip2,
    "clip": _clip,
}


def write_base(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random model of the architecture `name`, saved in `dtype`; every weight random, norms and biases too."""
    torch.manual_seed(7)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a directory by its own architecture; every tensor of the file is used, none is initialised."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    # Grouped matrix products have no float64.
    experts = {"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}
    model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **experts)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def write_adapter(base: Path, folder: Path, config: LoraConfig, *, seed: int = 1, change: Any = None) -> Path:
    """An adapter as peft saves it, all of whose weights are random (B too, as after training)."""
    model = load(base, torch.float32)
    if change is not None:
        change(model)
    tuned = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "magnitude" in name else 0.1
                parameter.add_(torch.randn_like(parameter) * scale)
    # peft sees by itself that a vocabulary has grown only where the configuration names it at its top.
    tuned.save_pretrained(folder, save_embedding_layers="auto" if change is None else True)
    return folder


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Arguments for a forward pass."""
    generator = torch.Generator().manual_seed(3)
    if hasattr(model.config, "num_channels"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator, dtype=model.dtype)}
    ids = torch.randint(4, V, (2, 9), generator=generator)
    arguments = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids.flip(1)
    return arguments


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs(model)).logits


def applied(base: Path, adapter: Path, dtype: torch.dtype | None = torch.float64, *, change: Any = None) -> Any:
    """Base and adapter in peft, not merged."""
    model = load(base, dtype)
    if change is not None:
        change(model)
    tuned = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    return tuned.to(dtype).eval() if dtype else tuned.eval()


def merged_by_peft(
    base: Path, adapter: Path, dtype: torch.dtype | None, *, change: Any = None
) -> dict[str, torch.Tensor]:
    """The weights after peft's own merge in `dtype` (None: the base's), by name."""
    return dict(applied(base, adapter, dtype, change=change).merge_and_unload().state_dict())


def grown(model: Any) -> None:
    """Six more rows in the vocabulary, always the same ones."""
    torch.manual_seed(5)
    model.resize_token_embeddings(V + 6)
