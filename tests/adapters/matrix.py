"""Architectures × configurations: adapters that peft makes, merged by us and by peft, compared tensor by tensor.

    python tests/adapters/matrix.py [ARCHITECTURE...] [CONFIGURATION...]

prints a Markdown table: the largest distance from peft's merge in float64 over float32, float16 and bfloat16, in
roundings of the stored dtype.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import tiny_models
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from tiny_families import FAMILIES, V, randomised, to_hub_names
from tiny_models import MODELS, load, write_adapter

from weightport.adapters.merging.merge import MergeOptions
from weightport.api import merge_lora
from weightport.errors import AdapterError, CoverageError

ARCHITECTURES: Mapping[str, Callable[[], Any]] = {**MODELS, **FAMILIES}

# Linear layers of attention and of the feed-forward network, by architecture.
_LINEAR: Mapping[str, tuple[str, str]] = {
    "bert": ("query", "dense"),
    "gpt2": ("c_attn", "c_proj"),
    "resnet": ("convolution", "convolution"),
    "t5": ("q", "wi"),
    "opt": ("q_proj", "fc1"),
    "bart": ("q_proj", "fc1"),
    "florence2": ("q_proj", "fc1"),
    "mixtral": ("q_proj", "o_proj"),
    "qwen3_moe": ("q_proj", "o_proj"),
    "gpt_oss": ("q_proj", "o_proj"),
    "blip2": ("q_proj", "fc1"),
    "vit": ("q_proj", "fc1"),
    "vision_encoder_decoder": ("c_attn", "c_proj"),
}
_NORMS: Mapping[str, str] = {
    "bert": "LayerNorm", "gpt2": "ln_f", "resnet": "normalization", "t5": "final_layer_norm",
    "opt": "final_layer_norm",
    "bart": "layernorm_embedding", "florence2": "layernorm_embedding", "blip2": "final_layer_norm", "vit": "layernorm",
    "vision_encoder_decoder": "ln_f", "mllama": "norm", "clip": "layer_norm1",
}  # fmt: skip
_EMBEDDED: Mapping[str, str] = {
    "bert": "word_embeddings", "clip": "token_embedding", "gpt2": "wte", "t5": "shared",
    "vision_encoder_decoder": "wte",
}  # fmt: skip
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "mixtral": ("experts.gate_up_proj", "experts.down_proj"),
    "qwen3_moe": ("experts.gate_up_proj", "experts.down_proj"),
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj"),
}
_NO_TOKENS = frozenset({"resnet", "vit"})


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Configuration:
    """How an adapter is made of an architecture: None where the architecture has no such adapter. `dtypes`: those in
    which peft's own merge is a measure."""

    make: Callable[[str], PeftConfig | None]
    options: MergeOptions = field(default_factory=MergeOptions)
    change: Any = None
    dtypes: tuple[torch.dtype, ...] = DTYPES


def _linear(name: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(_linear_names(name)), **settings})


def _linear_names(name: str) -> tuple[str, str]:
    return _LINEAR.get(name, ("q_proj", "down_proj"))


def _everywhere(name: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def _patterned(name: str) -> LoraConfig:
    first, second = _linear_names(name)
    return _linear(name, rank_pattern={first: 2}, alpha_pattern={second: 32, rf".*\.0\..*{first}": 5})


def _parameters(name: str, **settings: Any) -> LoraConfig | None:
    if name == "resnet":
        return None
    targets = _PARAMETERS.get(name) or (f"{_linear_names(name)[0]}.weight",)
    return LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=list(targets), **settings)


def _patterned_parameters(name: str) -> LoraConfig | None:
    targets = _PARAMETERS.get(name) or (f"{_linear_names(name)[0]}.weight",)
    return _parameters(name, alpha_pattern={targets[0]: 32}, rank_pattern={targets[-1].rpartition(".")[2]: 3})


def _router(name: str) -> LoraConfig | None:
    target = {"mixtral": "gate.weight", "qwen3_moe": "gate.weight", "gpt_oss": "router.weight"}.get(name)
    return LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=[target]) if target else None


def _of_text(name: str, config: Callable[[], LoraConfig]) -> LoraConfig | None:
    return None if name in _NO_TOKENS else config()


def _ends(name: str) -> tuple[str, str]:
    """The token embedding and the head."""
    return _EMBEDDED.get(name, "embed_tokens"), {"bert": "decoder"}.get(name, "lm_head")


def _tokens(name: str) -> LoraConfig:
    return _linear(name, trainable_token_indices={_EMBEDDED.get(name, "embed_tokens"): [5, 7, 90]})


def _embedding(name: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=[_EMBEDDED.get(name, "embed_tokens")])


def _head(name: str) -> LoraConfig | None:
    if name in _NO_TOKENS or name == "clip":
        return None
    return LoraConfig(r=4, lora_alpha=8, target_modules=[_ends(name)[1]])


def _method(name: str, config: Callable[..., PeftConfig], **settings: Any) -> PeftConfig | None:
    """An adapter of a method for linear layers alone."""
    return None if name == "resnet" else config(target_modules=list(_linear_names(name)), **settings)


def _bat(name: str) -> PeftConfig | None:
    return (
        None if name in ("gpt2", "vision_encoder_decoder") else _method(name, peft.MissConfig, r=8, init_weights="bat")
    )


def _no_dora(name: str) -> LoraConfig:
    return _linear(name, use_dora=True)


CONFIGURATIONS: Mapping[str, Configuration] = {
    "linear": Configuration(_linear),
    "all-linear": Configuration(_everywhere),
    "rslora": Configuration(partial(_linear, use_rslora=True)),
    "patterns": Configuration(_patterned),
    "dora": Configuration(_no_dora),
    "bias-all": Configuration(partial(_linear, bias="all")),
    "bias-lora-only": Configuration(partial(_linear, bias="lora_only")),
    "norms-saved": Configuration(lambda name: _linear(name, modules_to_save=[_NORMS.get(name, "norm")])),
    "one-layer": Configuration(lambda name: None if name == "resnet" else _linear(name, layers_to_transform=[1])),
    "excluded": Configuration(lambda name: _linear(name, exclude_modules=r".*\.0\..*")),
    "parameters": Configuration(_parameters),
    "parameters-patterns": Configuration(_patterned_parameters),
    "router": Configuration(_router),
    "tokens": Configuration(lambda name: _of_text(name, lambda: _tokens(name))),
    "embedding": Configuration(lambda name: _of_text(name, lambda: _embedding(name)), MergeOptions(untie=True)),
    "head": Configuration(lambda name: _head(name), MergeOptions(untie=True)),
    "tokens-added-saved": Configuration(
        lambda name: _of_text(name, lambda: _linear(name, modules_to_save=list(_ends(name)))), change=tiny_models.grown
    ),
    "tokens-added-rows": Configuration(
        lambda name: _of_text(
            name, lambda: _linear(name, trainable_token_indices={_ends(name)[0]: [*range(V, V + 6)]})
        ),
        change=tiny_models.grown,
    ),
    "resized": Configuration(lambda name: _of_text(name, lambda: _linear(name)), change=tiny_models.grown),
    # Transformed in float32 by peft whatever the model's dtype, which is roundings of a float32 weight.
    "fourierft": Configuration(lambda name: _method(name, peft.FourierFTConfig, n_frequency=90), dtypes=DTYPES[1:]),
    "waveft": Configuration(lambda name: _method(name, peft.WaveFTConfig, n_frequency=90)),
    "unilora": Configuration(
        lambda name: _method(name, peft.UniLoraConfig, r=4, theta_d_length=64, save_indices=True)
    ),
    "tinylora": Configuration(lambda name: _method(name, peft.TinyLoraConfig, r=3, u=5, weight_tying=0.5)),
    "miss-bat": Configuration(_bat),
}


def write_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, *, hub: bool = False) -> Path:
    """A random model of an architecture; `hub`: under the names that the Hub's repositories have."""
    torch.manual_seed(7)
    model = ARCHITECTURES[name]()
    randomised(model)
    model.to(dtype).save_pretrained(folder)
    if hub:
        to_hub_names(name, folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, *, change: Any = None, untied: bool = False) -> dict[str, torch.Tensor]:
    """The weights of peft's own merge in float64, of an adapter loaded without a missing key."""
    model = load(base, torch.float64)
    if change is not None:
        change(model)
    if untied:
        untie_everything(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        tuned = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(torch.float64)
    return dict(tuned.merge_and_unload().state_dict())


def untie_everything(model: Any) -> None:
    """Give every tied place a parameter of its own, so that peft's merge keeps them apart."""
    seen: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, copy.deepcopy(module))
        seen.add(id(module))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))
    model.all_tied_weights_keys = {}
    for part in [model.config, *(getattr(model.config, key) for key in model.config.sub_configs)]:
        part.tie_word_embeddings = False


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], dtype: torch.dtype) -> float:
    """The largest distance in roundings of `dtype`; infinite where names or shapes differ."""
    if set(found) != set(expected):
        return float("inf")
    furthest = 0.0
    for name, reference in expected.items():
        if found[name].shape != reference.shape:
            return float("inf")
        if reference.is_floating_point():
            step = torch.finfo(dtype).eps * reference.abs().clamp(min=float(reference.abs().mean()) + 1e-30)
            furthest = max(furthest, float(((found[name].double() - reference).abs() / step).max()))
    return furthest


# The head is one matrix with the embedding, and an adapter made so changes one of the two only.
_UNTIED = {
    *((name, "tokens-added-saved") for name in ARCHITECTURES),
    *(
        (name, kind)
        for name in ("blip2", "vision_encoder_decoder", "bart", "florence2")
        for kind in ("tokens", "tokens-added-rows")
    ),
}


# Pairs that cannot be merged: the error, and what it says.
REFUSED: Mapping[tuple[str, str], tuple[type[Exception], str]] = {
    ("t5", "tokens-added-saved"): (AdapterError, r"their new rows are in no file"),
    # The class wants eight rows more in the embedding than in the head; peft saves as many of both.
    **{
        ("mllama", kind): (CoverageError, r"must have one number of rows")
        for kind in ("resized", "tokens-added-saved", "tokens-added-rows")
    },
    # peft runs a tied head with trained rows and without its bias, which its merge brings back.
    **{
        ("bert", kind): (AdapterError, r"runs that head without its bias \(cls.predictions.bias\)")
        for kind in ("tokens", "tokens-added-rows")
    },
    # transformers cannot resize them.
    **{
        (name, kind): (NotImplementedError, r"(set|get)_input_embeddings.* not auto")
        for name in ("vision_encoder_decoder", "clip")
        for kind in ("resized", "tokens-added-saved", "tokens-added-rows")
    },
}

# Pairs of which peft's own merge is no measure: the unused cls.predictions.bias follows the trained
# cls.predictions.decoder.bias.
NOT_COMPARED = frozenset({("bert", "tokens-added-saved")})


def pairs() -> list[tuple[str, str]]:
    """Architectures and the configurations whose adapter they can have, without those that are refused."""
    return [
        (architecture, name)
        for architecture in ARCHITECTURES
        for name, configuration in CONFIGURATIONS.items()
        if configuration.make(architecture) is not None
        if (architecture, name) not in REFUSED and (architecture, name) not in NOT_COMPARED
    ]


def options_of(architecture: str, configuration: str) -> MergeOptions:
    """What must be asked of the merge."""
    options = CONFIGURATIONS[configuration].options
    return MergeOptions(untie=True) if (architecture, configuration) in _UNTIED else options


def run(architecture: str, configuration: str, folder: Path, dtype: torch.dtype, *, hub: bool = False) -> float:
    """The distance of our merge from peft's."""
    chosen = CONFIGURATIONS[configuration]
    config = chosen.make(architecture)
    assert config is not None, f"{architecture} has no adapter {configuration}"
    base = write_model(architecture, folder / "base", dtype, hub=hub)
    adapter = write_adapter(base, folder / "adapter", config, change=chosen.change)
    options = options_of(architecture, configuration)
    merged = merge_lora(base, [(adapter, 1.0)], folder / "out", options)
    found = load(merged.directory).state_dict()
    expected = merged_by_peft(base, adapter, change=chosen.change, untied=options.untie)
    return distance(found, expected, dtype)


def cell(architecture: str, configuration: str) -> str:
    """What the table says of a pair: the largest distance of the dtypes, "refused", or what went wrong."""
    if CONFIGURATIONS[configuration].make(architecture) is None:
        return "–"
    if (architecture, configuration) in NOT_COMPARED:
        return "not compared"
    furthest = 0.0
    for dtype in CONFIGURATIONS[configuration].dtypes:
        with tempfile.TemporaryDirectory() as folder:
            try:
                furthest = max(furthest, run(architecture, configuration, Path(folder), dtype))
            except Exception as error:  # whatever peft, transformers or the merge raise is the result
                kind, said = REFUSED.get((architecture, configuration), (None, ""))
                if kind is not None and isinstance(error, kind) and re.search(said, str(error)):
                    return "refused"
                return f"{type(error).__name__} ({dtype}): {str(error)[:400]}"
    return f"{furthest:.2f}"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    configurations = [name for name in names if name in CONFIGURATIONS] or list(CONFIGURATIONS)
    architectures = [name for name in names if name in ARCHITECTURES] or list(ARCHITECTURES)
    print("| | " + " | ".join(configurations) + " |\n|---" + "|---" * len(configurations) + "|", flush=True)
    for architecture in architectures:
        print(
            f"| {architecture} | " + " | ".join(cell(architecture, name) for name in configurations) + " |", flush=True
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
