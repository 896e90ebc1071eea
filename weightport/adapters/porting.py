"""port_adapter(): a LoRA adapter trained on an original's modules, for the native model.

Built on the family's rule table: where a weight goes, its pair of low-rank matrices goes, and what happens to the
weight says what happens to the pair. Module names in the settings are replaced by the full native names of the
modules that the adapter has tensors for, so that no pattern can hit more or less than it did.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.adapters.base.base_model import open_base
from weightport.adapters.family import AdapterFamily, FamilyLookup
from weightport.adapters.merging.module_names import running_names
from weightport.adapters.reading.lora_settings import LoraSettings, parse_lora_settings
from weightport.checkpoints import TensorRef, open_checkpoint
from weightport.checkpoints.formats.sharded import read_json
from weightport.checkpoints.lazy_tensors import in_memory
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.lora_patterns import of_saved
from weightport.converters.low_rank_pair import LowRankPair
from weightport.converters.name_spaces import NameSpace
from weightport.converters.operations import applied
from weightport.converters.record import read_record
from weightport.converters.rules import Rule, RuleTable
from weightport.errors import AdapterError, CheckpointError, UnknownFamilyError
from weightport.writing import require_directory, whole_directory
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import aligned, write_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B)(\.default)?\.weight|(?P<magnitude>lora_magnitude_vector)(\.default\.weight)?"
    r"|(?P<bias>lora_B(\.default)?\.bias))"
)
_HEAD_NOTE = (
    "The adapter trains the head, which the base ties to its token embedding. Applied, it is exact; before a merge "
    "the head must be untied (weightport.adapters.untie_head), or it changes the input embeddings too."
)
_WRAPPED = re.compile(r".+\.original_module\..+")


@dataclass(frozen=True)
class Base:
    """What an adapter is ported to: the family's table with the head apart from the embedding, and the native
    shapes."""

    family: AdapterFamily
    rules: RuleTable
    shapes: Mapping[str, tuple[int, ...]]
    directory: Path | None
    tied: bool


@dataclass(frozen=True)
class PortedAdapter:
    """A finished port: native modules by original module, with pairs and saved as a whole, and what the user should
    know."""

    directory: Path
    modules: Mapping[str, tuple[str, ...]]
    saved: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def port_adapter(
    adapter: str | Path, out: str | Path, base: str | Path, families: FamilyLookup, *, overwrite: bool = False
) -> PortedAdapter:
    """Write the adapter in the folder `adapter` to the folder `out`, for the native model of `base`.

    One that was trained on the native model itself, under today's names or those of an earlier transformers, gets
    today's.
    `base` is the original checkpoint or the directory converted from it. Tensors keep their dtypes and values. Raises
    AdapterError naming every module that cannot be carried; nothing is written then.
    """
    adapter, out = Path(adapter), Path(out)
    inputs = [adapter, base]
    require_directory(out, overwrite=overwrite, inputs=inputs)
    settings = read_settings(adapter)
    target = read_base(Path(base), families)
    tensors = dict(open_checkpoint(_weights(adapter)))
    settings.require_bounded(_module_names(tensors), str(adapter / CONFIG))
    pairs, biases, saved = _sorted_out(tensors, settings, str(adapter))
    names = _running_names([*pairs, *(name.rpartition(".")[0] for name in {**biases, **saved})], target)
    ported: dict[str, torch.Tensor] = {}
    modules: dict[str, tuple[str, ...]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    refused: list[str] = []
    for module, sides in pairs.items():
        try:
            natives = (
                _port_pair(module, sides, target, settings)
                if names is None
                else [_rename_pair(module, sides, names, settings)]
            )
        except AdapterError as error:
            refused.append(str(error))
            continue
        modules[module] = tuple(name for name, _ in natives)
        for name, pair in natives:
            ported |= {_PREFIX + key: tensor for key, tensor in pair.tensors(name).items()}
            ranks[name], alphas[name] = settings.rank(module), settings.alpha(module)
    kept: dict[str, tuple[str, ...]] = {}
    unused: list[str] = []
    for name, ref in {**biases, **saved}.items():
        if name in biases and target.rules.drop_of(name) is not None:
            unused.append(name)
            continue
        try:
            parts = _port_whole(name, ref, target) if names is None else [_rename_whole(name, ref, names)]
        except AdapterError as error:
            refused.append(str(error))
            continue
        owners = tuple(native.rpartition(".")[0] for native, _ in parts)
        for (native, value), owner in zip(parts, owners):
            # Beside a pair, peft keeps a layer's own bias one level down.
            key = f"{owner}.base_layer.bias" if name in biases and owner in ranks else native
            ported[_PREFIX + key] = value
        if name in saved:
            kept[name.rpartition(".")[0]] = owners
    if refused:
        shown = "\n      ".join(refused[:12]) + (
            f"\n      … and {len(refused) - 12} more" if len(refused) > 12 else ""
        )
        raise AdapterError(f"{adapter} cannot be carried to the native model:\n      {shown}")
    wholes = sorted({owner for owners in kept.values() for owner in owners})
    config = _native_settings(settings, ranks, alphas, wholes, target)
    with whole_directory(out, overwrite=overwrite, inputs=inputs) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_safetensors(aligned(Outgoing.of(name, ported[name]) for name in sorted(ported)), folder / WEIGHTS)
    return PortedAdapter(out, modules, kept, _notes(modules, unused, target))


def read_settings(adapter: Path) -> LoraSettings:
    """The adapter_config.json of the folder `adapter`. Raises AdapterError, CheckpointError when it is no JSON."""
    path = adapter / CONFIG
    if not path.is_file():
        raise AdapterError(f"{adapter} is not an adapter: it has no {CONFIG}. Give the folder that peft saved.")
    return parse_lora_settings(read_json(path), str(path))


def read_base(base: Path, families: FamilyLookup) -> Base:
    """The family's table and native shapes, of an original checkpoint or of a converted directory."""
    config, family, layout, directory = _native_config(base, families)
    # An adapter on the head is one on the head alone, also where the base ties it to the embedding.
    apart = copy.deepcopy(config)
    # Some models of several parts say so in their language model's configuration alone.
    words: Any = apart if hasattr(apart, "tie_word_embeddings") else apart.get_text_config(decoder=True)
    tied = bool(words.tie_word_embeddings)
    words.tie_word_embeddings = False
    conversion = family.conversion
    return Base(family, conversion.rules_of(apart, layout), conversion.targets(apart).shapes, directory, tied)


def _native_config(base: Path, families: FamilyLookup) -> tuple[PreTrainedConfig, AdapterFamily, str, Path | None]:
    from weightport.converters.export import load_config

    checkpoint = open_checkpoint(base)
    if base.is_dir() and (base / "config.json").is_file() and families.recognised(checkpoint) is None:
        config = load_config(base)
        native = families.of_model_type(config.model_type)
        if native is None:
            raise UnknownFamilyError(f"{base} holds a {config.model_type!r} model, which belongs to no known family.")
        return config, native, str((read_record(base) or {}).get("layout", "")), base
    family = families.recognise(checkpoint)
    model = family.conversion.read(Sources({MAIN: checkpoint}), family.bare_options)
    return model.config, family, model.layout, None


def _weights(adapter: Path) -> Path:
    for name in (WEIGHTS, "adapter_model.bin"):
        if (adapter / name).is_file():
            return adapter / name
    raise CheckpointError(f"{adapter} holds no {WEIGHTS} or adapter_model.bin.")


def _module_names(tensors: Mapping[str, TensorRef]) -> set[str]:
    """What the settings' patterns are matched with: names of tensors, and of the modules that hold them."""
    names = {name.removeprefix(_PREFIX) for name in tensors}
    return names | {name.partition(".lora_")[0] for name in names}


def _sorted_out(
    tensors: Mapping[str, TensorRef], settings: LoraSettings, where: str
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef], dict[str, TensorRef]]:
    """(parts of pairs by the original's module; trained biases, whole tensors of modules_to_save by the original's
    name). Raises AdapterError."""
    dora, bias = bool(settings.data.get("use_dora")), settings.data.get("bias") or "none"
    pairs: dict[str, dict[str, TensorRef]] = {}
    biases: dict[str, TensorRef] = {}
    saved: dict[str, TensorRef] = {}
    unknown = []
    for key, ref in tensors.items():
        name = key
        while name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        found = _PART.fullmatch(name)
        if found and (dora or not found["magnitude"]):
            part = found["side"] or ("magnitude" if found["magnitude"] else "bias")
            pairs.setdefault(found["module"], {})[part] = ref
        elif ".lora_" in name:
            unknown.append(key)
        elif _WRAPPED.fullmatch(name):
            continue  # what a module saved as a whole was before the training
        elif bias != "none" and name.endswith(".bias") and not _is_saved(name, settings):
            biases[name.replace(".base_layer.", ".")] = ref
        else:
            saved[name.replace(".modules_to_save.default.", ".")] = ref
    if unknown:
        raise AdapterError(
            f"{where} holds tensors that are no plain LoRA pair (embeddings, and DoRA's without use_dora, are not "
            "carried): " + ", ".join(unknown[:6])
        )
    incomplete = [module for module, parts in pairs.items() if not {"A", "B"} <= set(parts)]
    if incomplete:
        raise AdapterError(f"{where} lacks one of lora_A and lora_B of {', '.join(incomplete[:6])}.")
    without = [module for module, parts in pairs.items() if dora and "magnitude" not in parts]
    if without:
        raise AdapterError(
            f"{where} asks for DoRA (use_dora), but has no lora_magnitude_vector of {', '.join(without[:6])}."
        )
    if bias == "all" and not biases:
        raise AdapterError(f"{where} trains biases (bias: 'all'), but holds none. Save it again.")
    if not pairs and not saved and not biases:
        raise AdapterError(f"{where} holds no tensors.")
    return pairs, biases, saved


def _is_saved(name: str, settings: LoraSettings) -> bool:
    """Whether the tensor is of a module that is saved as a whole, as peft matches modules_to_save."""
    return ".modules_to_save." in name or any(
        re.match(of_saved(module), name) for module in settings.data.get("modules_to_save") or ()
    )


def _running_names(modules: Sequence[str], base: Base) -> NameSpace | None:
    """The native model's names, where the adapter was trained on it under these or those of an earlier transformers:
    it is carried by renaming. None for an adapter on the original's modules, and beside an original checkpoint."""
    if base.directory is None or any(next(base.rules.of_source(f"{name}.weight"), None) for name in modules):
        return None
    space = running_names(open_base(base.directory))
    known = space is not None and any(space.current(f"{name}.weight") for name in modules)
    return space if known else None


def _rename_pair(
    module: str, parts: Mapping[str, TensorRef], names: NameSpace, settings: LoraSettings
) -> tuple[str, LowRankPair]:
    """(the module's name of today, its pair as it is)."""
    current = names.current(f"{module}.weight")
    if current is None:
        raise AdapterError(f"{module}: is no module of the base")
    a, b = parts["A"], parts["B"]
    given, weight = (b.shape[0], *a.shape[1:]), names.shapes[current]
    if a.shape[:1] != (settings.rank(module),) or b.shape[1:2] != a.shape[:1]:
        raise AdapterError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of rank {settings.rank(module)}, as "
            f"{CONFIG} says"
        )
    if given != weight:
        raise AdapterError(
            f"{module}: the pair gives {list(given)}, the base's weight is {list(weight)}: another base"
        )
    magnitude, bias = (parts[part].read() if part in parts else None for part in ("magnitude", "bias"))
    return current.removesuffix(".weight"), LowRankPair(a.read(), b.read(), magnitude, bias)


def _rename_whole(name: str, ref: TensorRef, names: NameSpace) -> tuple[str, torch.Tensor]:
    """(a whole tensor's name of today, its values)."""
    current = names.current(name)
    if current is None:
        raise AdapterError(f"{name}: is no tensor of the base")
    if ref.shape != names.shapes[current]:
        raise AdapterError(f"{name}: is {list(ref.shape)}, the base's is {list(names.shapes[current])}: another base")
    return current, ref.read()


def _port_pair(
    module: str, parts: Mapping[str, TensorRef], base: Base, settings: LoraSettings
) -> list[tuple[str, LowRankPair]]:
    """(native module, its pair) for every module that the original's became."""
    rule, names = _rule_of(f"{module}.weight", base)
    a, b = parts["A"], parts["B"]
    rank = settings.rank(module)
    if a.shape[:1] != (rank,) or b.shape[1:2] != (rank,):
        raise AdapterError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of rank {rank}, as {CONFIG} says"
        )
    weight = _original_shape(rule, names, base)
    if len(weight) == 4 and weight[1] == 1 and a.shape[1:2] == weight[:1]:
        raise AdapterError(
            f"{module}: a dense low-rank convolution beside a depthwise one {list(weight)} has no weight to go to"
        )
    given = (b.shape[0], *a.shape[1:])
    if given != weight:
        raise AdapterError(
            f"{module}: the pair gives {list(given)}, the base's weight is {list(weight)}: another base"
        )
    for part in ("magnitude", "bias"):
        if part in parts and parts[part].numel != weight[0]:
            raise AdapterError(f"{parts[part].name} is {list(parts[part].shape)}, expected {weight[0]} values")
    magnitude, bias = (parts[part].read() if part in parts else None for part in ("magnitude", "bias"))
    try:
        pairs = rule.operation.pairs(LowRankPair(a.read(), b.read(), magnitude, bias))
    except AdapterError as error:
        raise AdapterError(f"{module}: {error}") from error
    return [(name.removesuffix(".weight"), pair) for name, pair in zip(names, pairs)]


def _port_whole(name: str, ref: TensorRef, base: Base) -> list[tuple[str, torch.Tensor]]:
    """A whole tensor (a trained bias, or of modules_to_save): its native names and its values there."""
    rule, names = _rule_of(name, base)
    if rule.aliases:
        raise AdapterError(f"{name}: trained as a whole, but it is tied in the native model")
    expected = _original_shape(rule, names, base)
    if ref.shape != expected:
        raise AdapterError(f"{name}: is {list(ref.shape)}, the base's is {list(expected)}: another base")
    return list(zip(names, applied(rule.operation.forward, [ref.read()])))


def _rule_of(name: str, base: Base) -> tuple[Rule, list[str]]:
    """The rule of an original tensor and the native names it becomes. Raises AdapterError for an unknown one."""
    claim = next(base.rules.of_source(name), None)
    module = name.removesuffix(".weight")
    if claim is None:
        native = next(base.rules.of_target(name), None) or next(base.rules.of_target(f"model.{name}"), None)
        what = "has a native name already" if native else f"is no module of {base.family.title}"
        raise AdapterError(f"{module}: {what}")
    rule = claim.rule
    if rule.stacked:
        raise AdapterError(f"{module}: its weight is that of all layers, which a low-rank pair cannot follow")
    names = rule.target_names(claim.captures)
    if len(rule.sources) > 1:
        raise AdapterError(f"{module}: its weight is joined with others in the native model")
    absent = [target for target in names if target not in base.shapes]
    if absent:
        raise AdapterError(f"{module}: would be {', '.join(absent)}, which the base does not have: another base")
    return rule, names


def _original_shape(rule: Rule, names: Sequence[str], base: Base) -> tuple[int, ...]:
    native = [torch.empty(base.shapes[name], device="meta") for name in names]
    return tuple(rule.operation.backward([in_memory(each) for each in native])[0].shape)


def _native_settings(
    settings: LoraSettings, ranks: Mapping[str, int], alphas: Mapping[str, float], saved: list[str], base: Base
) -> dict[str, Any]:
    """adapter_config.json with full native names: only they can be told apart by nothing but themselves."""
    data = dict(settings.data)
    rank, alpha = settings.default_rank, settings.default_alpha
    data |= {
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "base_model_name_or_path": str(base.directory) if base.directory is not None else None,
        "revision": None,
        "auto_mapping": None,
    }
    if "exclude_modules" in data:
        data["exclude_modules"] = None
    return data


def _notes(modules: Mapping[str, tuple[str, ...]], unused: Sequence[str], base: Base) -> tuple[str, ...]:
    notes = []
    if unused:
        notes.append(f"Left out, as the model computes nothing with them: {', '.join(unused)}.")
    head = [native for natives in modules.values() for native in natives if native == "lm_head"]
    if head and base.tied:
        notes.append(_HEAD_NOTE)
    return tuple(notes)
