"""The tensors of a LoRA adapter, sorted by the module that each belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.reading.additive_tensors import METHODS, ModuleDelta, module_deltas
from weightport.adapters.reading.block_diagonal import expanded
from weightport.adapters.reading.lora_config import MergeSettings, read_merge_settings
from weightport.adapters.reading.tinylora_vectors import with_own_vectors
from weightport.checkpoints import TensorRef, open_checkpoint
from weightport.errors import AdapterError, CheckpointError, NonFiniteError
from weightport.file_state import FileState

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_TOKEN_BASE = re.compile(r"(?P<module>.+?)\.token_adapter\.base_layer\.(?P<leaf>weight|bias)")
# Beside a resized vocabulary peft saves what its wrapper holds, without the adapter's name.
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?:(?P<adapter>[^.]+)\.(?P<rest>.+)|(?P<leaf>[^.]+))")
# VeLoRA's projection compresses what training keeps of the inputs: no output depends on it.
_IGNORED = re.compile(r".+\.original_module\..+|.+\.lora_velora_embed(\..+)?")
_OTHER_METHOD = re.compile(
    r".+\.(lora_(?!A|B|embedding)\w+|hada_\w+|lokr_\w+|ia3_l|oft_\w+|vera_\w+|prompt_\w+)(\..+)?"
)


@dataclass(frozen=True)
class ModuleAdapter:
    """What an adapter adds to one module. `depth` counts base layers between: parameters wrapped in one another.
    `owner`: the wrapped module that this one is a part of (of MultiheadAttention: out_proj).

    Linear: a [r, in], b [out, r]. Convolution: a [r, in, …], b [out, r, 1, …]. Embedding: a [r, rows], b [dim, r].
    magnitude: DoRA's, one value an output (an embedding dimension). bias: of lora_B (lora_bias), [out].
    """

    module: str
    a: TensorRef
    b: TensorRef
    embedding: bool = False
    magnitude: TensorRef | None = None
    bias: TensorRef | None = None
    depth: int = 0
    owner: str | None = None

    @property
    def key(self) -> str:
        """What rank_pattern and alpha_pattern are matched against."""
        return self.owner or self.module


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter, opened: nothing of its weights is read yet.

    `modules` are low-rank pairs, `deltas` what other methods have for a module, `whole` tensors that take the place of
    the base's (biases, modules_to_save, resized embeddings), `tokens` single rows of embeddings, `token_bases` the
    tensors of modules that these are rows of, where the vocabulary was resized; names are the adapter's. `ported`:
    where a copy with the native model's module names stands, for an adapter that came with the original's.
    """

    path: Path
    settings: MergeSettings
    modules: tuple[ModuleAdapter, ...]
    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    tokens: Mapping[str, TensorRef] = field(default_factory=dict)
    token_bases: Mapping[str, TensorRef] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    states: Mapping[Path, FileState] = field(default_factory=dict)
    ported: Path | None = None
    deltas: tuple[ModuleDelta, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that the adapter changes, but for those it holds as a whole."""
        return (*(module.module for module in self.modules), *(delta.module for delta in self.deltas))

    @property
    def folder(self) -> Path:
        """The folder that peft can load beside the base: the given one, or the one it was ported to."""
        return self.ported or self.path


def open_adapter(folder: Path) -> LoraAdapter:
    """The adapter in `folder`. Raises AdapterError for one that is incomplete, not finite, or of another
    method."""
    settings = read_merge_settings(folder)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds {settings.where}, but neither {WEIGHTS[0]} nor {WEIGHTS[1]}.")
    checkpoint = open_checkpoint(path)
    tensors = dict(checkpoint.items())
    deltas: tuple[ModuleDelta, ...] = ()
    keyed = {_stripped(key): ref for key, ref in tensors.items()}
    if settings.method == "TINYLORA":
        keyed = with_own_vectors(keyed, settings.data, path)
    if settings.method in METHODS:
        deltas, keyed = module_deltas(settings.method, keyed, path)
    parts: dict[tuple[str, int], dict[str, TensorRef]] = {}
    owners: dict[str, str] = {}
    whole: dict[str, TensorRef] = {}
    tokens: dict[str, TensorRef] = {}
    token_bases: dict[str, TensorRef] = {}
    adapters: set[str] = set()
    for name, ref in keyed.items():
        if found := _PART.fullmatch(name):
            module, depth = _unwrapped(found["module"])
            owner, inside, child = found["module"].rpartition(".base_layer.")
            if inside and child == "out_proj":
                owners[module] = _unwrapped(owner)[0]
            part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
            if parts.setdefault((module, depth), {}).setdefault(part, ref) is not ref:
                raise AdapterError(f"{path} holds {part} of {module} twice: save one adapter, not several.")
        elif found := _TOKENS.fullmatch(name):
            module, _ = _unwrapped(found["module"])
            tokens[module] = ref
        elif found := _TOKEN_BASE.fullmatch(name):
            token_bases[f"{_unwrapped(found['module'])[0]}.{found['leaf']}"] = ref
        elif found := _SAVED.fullmatch(name):
            whole[f"{found['module']}.{found['rest'] or found['leaf']}"] = ref
        elif _IGNORED.fullmatch(name):
            continue
        elif _OTHER_METHOD.fullmatch(name):
            raise AdapterError(f"{path}: {name} is of no LoRA that can be merged; merge the adapter with peft.")
        else:
            found = None
            whole[name.replace(".base_layer.", ".")] = ref
        if found and found.groupdict().get("adapter"):
            adapters.add(found["adapter"])
    if len(adapters) > 1:
        raise AdapterError(
            f"{path} holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); save one a folder."
        )
    blocks = settings.data.get("use_bdlora")
    modules = tuple(_module(path, name, depth, found, owners, blocks) for (name, depth), found in parts.items())
    if settings.method in METHODS and (modules or not deltas):
        raise AdapterError(f"{path} should hold the tensors of a {settings.method} adapter, and holds others.")
    if not modules and not deltas and not whole and not tokens:
        raise AdapterError(f"{path} holds no tensors.")
    files = (folder / "adapter_config.json", path)
    adapter = LoraAdapter(
        folder, settings, modules, whole, tokens, token_bases, files, checkpoint.states, deltas=deltas
    )
    settings.require_bounded([*adapter.targets, *whole, *tokens], settings.where)
    _check(adapter, tensors)
    return adapter


def _stripped(key: str) -> str:
    name = key
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _unwrapped(module: str) -> tuple[str, int]:
    """(the module's own name, base layers in it): peft wraps a module once for each of its target_parameters."""
    parts = module.split(".")
    return ".".join(part for part in parts if part != "base_layer"), parts.count("base_layer")


def _module(
    path: Path,
    name: str,
    depth: int,
    parts: Mapping[str, TensorRef],
    owners: Mapping[str, str],
    blocks: Mapping[str, Any] | None,
) -> ModuleAdapter:
    pair = (
        ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts or "lora_embedding_B" in parts else ()
    )
    pair = pair or ("lora_A", "lora_B")
    absent = [part for part in pair if part not in parts]
    if absent:
        have = ", ".join(sorted(parts))
        raise AdapterError(
            f"{path}: {name} has {have}, but no {absent[0]}. The adapter is incomplete: a half of a pair says "
            "nothing. Save it again; under DeepSpeed or FSDP gather the parameters first."
        )
    a, b = (parts[part] for part in pair)
    if blocks:
        a, b = expanded(blocks, name, a, b)
    return ModuleAdapter(
        name,
        a,
        b,
        embedding=pair[0] == "lora_embedding_A",
        magnitude=parts.get("lora_magnitude_vector"),
        bias=parts.get("lora_B.bias"),
        depth=depth,
        owner=owners.get(name),
    )


def _check(adapter: LoraAdapter, tensors: Mapping[str, TensorRef]) -> None:
    """Ranks, DoRA's magnitudes, and finite values."""
    settings = adapter.settings
    for module in adapter.modules:
        a, b = module.a.shape, module.b.shape
        if len(a) < 2 or len(b) != len(a) or 0 in a or 0 in b or not _one_rank(a, b):
            raise AdapterError(
                f"{module.a.name} {list(a)} and {module.b.name} {list(b)} are no pair of low rank: the first size of "
                "A and the second of B should be the rank. Parameters of DeepSpeed or FSDP must be gathered "
                "before saving."
            )
        if not (module.a.dtype.is_floating_point and module.b.dtype.is_floating_point):
            raise AdapterError(
                f"{module.a.name} and {module.b.name} are {module.a.dtype} and {module.b.dtype}; expected "
                "floating-point numbers. A quantised adapter must be brought back first."
            )
        rank = settings.rank(module.key)
        # Ranks of parameters depend on which parameter of the module it is, which the base says.
        of_parameter = any(_of_parameter(name, module.module) for name in settings.target_parameters)
        if a[0] != rank and not of_parameter:
            raise AdapterError(
                f"{module.a.name} has the rank {a[0]}, but {settings.where} says {rank} (r and rank_pattern). "
                "The two files are of different trainings: the adapter's strength depends on the rank."
            )
        if settings.use_dora and module.magnitude is None:
            raise AdapterError(
                f"{adapter.path}: use_dora is set, but {module.module} has no lora_magnitude_vector. Save it again."
            )
        if module.magnitude is not None and not settings.use_dora:
            raise AdapterError(
                f"{adapter.path}: {module.module} has a lora_magnitude_vector, but use_dora is not set in "
                f"{settings.where}."
            )
    for name, ref in tensors.items():
        if ref.dtype.is_floating_point and not is_finite(ref.read()):
            raise NonFiniteError(
                f"{adapter.path}: {name} holds NaN or infinity. A training run that diverged leaves such an adapter; "
                "take an earlier checkpoint of it."
            )


def _one_rank(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether B takes what A gives. Beside a convolution in groups B is one in groups too: whether that can be merged
    is a question to the base."""
    return a[0] == b[1] or (len(a) > 2 and a[0] % b[1] == 0)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite, as a rule in one pass over the values."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    # One element that is not finite makes the sum so; a sum may also overflow on its own, hence the second look.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _of_parameter(name: str, module: str) -> bool:
    owner = name.rpartition(".")[0]
    return not owner or module == owner or module.endswith(f".{owner}")
