"""plan_merge(): every tensor of the merged model, with what happens to it, before a byte is written.

Whatever cannot be done is listed in one error: modules that the base does not have, pairs that do not fit, adapters
that lack layers, changes to one of two tied places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import Checkpoint, TensorRef
from ..converters.writing import same_bits
from ..errors import AdapterError, CoverageError, UsageError
from .base_names import BaseNames
from .changes import Change, Vector, is_conv1d, is_flipped, misfit, parameter_change, read_pair
from .combination import SUM, Combination, Weighted, check_combination, combine
from .edits import Dora, Edit, Output
from .lora_tensors import LoraAdapter, ModuleAdapter
from .quantized import is_quantized_layer
from .ties import TiedHead, is_head_module, tied_head, token_embedding

SHOWN = 10
WEIGHTED_SUM = Combination()
_OUTPUT_BIAS = re.compile(r"(.*\.)?(final_logits_bias|(lm_head|predictions|predictions\.decoder)\.bias)")


@dataclass(frozen=True)
class Base:
    """The model directory to merge into."""

    path: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write: tensors by file, in file order. `resized`: rows of the vocabulary before and after."""

    shards: Mapping[str, tuple[Output, ...]]
    notes: tuple[str, ...] = ()
    resized: tuple[int, int] | None = None
    untied: TiedHead | None = None
    embedding_rows: int | None = None

    @property
    def outputs(self) -> list[Output]:
        return [out for outputs in self.shards.values() for out in outputs]

    @property
    def nbytes(self) -> int:
        return sum(out.nbytes for out in self.outputs)


@dataclass
class _Touched:
    """What the adapters say about one tensor. Adapters are given by their place in the command."""

    pairs: list[tuple[int, ModuleAdapter]] = field(default_factory=list)
    parameters: list[tuple[int, ModuleAdapter]] = field(default_factory=list)
    biases: list[tuple[int, ModuleAdapter]] = field(default_factory=list)
    whole: list[tuple[int, TensorRef]] = field(default_factory=list)
    tokens: list[tuple[int, TensorRef, Sequence[int]]] = field(default_factory=list)

    @property
    def sources(self) -> tuple[str, ...]:
        modules = [module.module for _, module in (*self.pairs, *self.parameters)]
        rest = [module.bias.name for _, module in self.biases if module.bias is not None]
        return tuple(
            dict.fromkeys(
                [*modules, *rest, *(ref.name for _, ref in self.whole), *(t.name for _, t, _ in self.tokens)]
            )
        )


def unresolved(base: Base, adapter: LoraAdapter) -> list[str]:
    """The adapter's modules that the base has under no certain name (a tied head has none of its own)."""
    names = BaseNames(base.checkpoint.tensors)
    parameters = {name.rpartition(".")[0] for name in adapter.settings.target_parameters}
    return [
        module.module
        for module in adapter.modules
        if _weight_of(names, module) is None
        and not is_head_module(module.module)
        and not any(not owner or f".{module.module}".endswith(f".{owner}") for owner in parameters)
    ] + [
        name.rpartition(".")[0]
        for name in adapter.whole
        if names.find(name) is None and not is_head_module(name.rpartition(".")[0])
    ]


def plan_merge(
    base: Base,
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    combination: Combination = WEIGHTED_SUM,
    untie: bool = False,
    quantized_base: str | None = None,
) -> MergePlan:
    """The plan of merging `adapters` with `weights` into `base`. Raises AdapterError, CoverageError, UsageError."""
    check_combination(
        combination,
        [
            max(adapter.settings.default_rank, *(adapter.settings.data.get("rank_pattern") or {0: 0}).values())
            for adapter in adapters
        ],
        rslora=any(adapter.settings.use_rslora for adapter in adapters),
    )
    _require_weights(adapters, weights, combination)
    tensors = base.checkpoint.tensors
    tied = tied_head(tensors, base.config)
    touched = _gather(base, adapters, tied)
    for adapter in adapters:
        _require_all_layers(base, adapter)
    untied = _settle_ties(tied, touched, tensors, adapters, untie)
    context = _Context(base, adapters, weights, combination, quantized_base)
    edits, problems = context.edits(touched, untied)
    if problems:
        raise AdapterError(_listed(f"{_names(adapters)} cannot be merged into {base.path}:", problems))
    outputs = {name: _output(name, ref, edits.get(name), dtype) for name, ref in _stored_once(tensors).items()}
    embedding = token_embedding(tensors)
    resized = _resized(base, outputs, embedding, tied if untied is None else None)
    _follow_vocabulary(outputs, resized)
    shards = _lay_out(base, outputs, reorder=dtype is not None)
    if untied is not None:
        _append_own_head(shards, untied, outputs, edits, tensors, dtype)
    return MergePlan(
        {name: tuple(found) for name, found in shards.items()},
        tuple(_notes(adapters, untied, resized, touched)),
        resized,
        untied,
        outputs[embedding].shape[0] if embedding in outputs else None,
    )


def _gather(base: Base, adapters: Sequence[LoraAdapter], tied: TiedHead | None) -> dict[str, _Touched]:
    """What touches each tensor of the base. Raises AdapterError listing everything that touches none."""
    names = BaseNames(base.checkpoint.tensors)
    touched: dict[str, _Touched] = {}
    lost: list[str] = []
    for place, adapter in enumerate(adapters):
        for module in adapter.modules:
            name = _weight_of(names, module)
            if name is None and tied is not None and is_head_module(module.module):
                name = tied.head
            if name is not None:
                found = touched.setdefault(name, _Touched())
                if any(other == place for other, _ in found.pairs):
                    lost.append(f"{module.module}: two modules of the adapter are {name} in the base")
                found.pairs.append((place, module))
            elif (parameter := _parameter_of(base, names, adapter, module)) is not None:
                touched.setdefault(parameter, _Touched()).parameters.append((place, module))
            else:
                lost.append(_lost(names, f"{module.module}.weight"))
            if module.bias is not None:
                bias = names.find(f"{module.module}.bias")
                if bias is None:
                    lost.append(f"{module.bias.name}: the base's layer has no bias to add it to (lora_bias)")
                else:
                    touched.setdefault(bias, _Touched()).biases.append((place, module))
        for key, ref in adapter.whole.items():
            name = names.find(key)
            if name is None and tied is not None and is_head_module(key.rpartition(".")[0]):
                name = tied.head
            if name is None and tied is not None and key in tied.places:
                name = tied.embedding
            if name is None:
                lost.append(_lost(names, key))
            else:
                touched.setdefault(name, _Touched()).whole.append((place, ref))
        for key, ref in adapter.tokens.items():
            name = names.find(f"{key}.weight")
            rows = adapter.settings.trained_tokens(key)
            if name is None:
                lost.append(_lost(names, f"{key}.weight"))
            elif rows is None or len(rows) != ref.shape[0] or max(rows) >= base.checkpoint[name].shape[0]:
                lost.append(f"{key}: {ref.shape[0]} trained rows do not fit trainable_token_indices ({rows})")
            else:
                touched.setdefault(name, _Touched()).tokens.append((place, ref, rows))
    if lost:
        raise AdapterError(
            _listed(f"{_names(adapters)} belongs to another base than {base.path}, which does not have:", lost)
        )
    return touched


def _weight_of(names: BaseNames, module: ModuleAdapter) -> str | None:
    """The base's name of the weight that a module's pair is added to (of MultiheadAttention: in_proj_weight)."""
    return names.find(f"{module.module}.weight") or names.find(f"{module.module}.in_proj_weight")


def _parameter_of(base: Base, names: BaseNames, adapter: LoraAdapter, module: ModuleAdapter) -> str | None:
    """The base's name of the parameter (target_parameters) that the module's pair fits; None unless it is only one."""
    fitting = []
    for entry in adapter.settings.target_parameters:
        owner, _, leaf = entry.rpartition(".")
        name = names.find(f"{module.module}.{leaf}")
        if name is None or (owner and not f".{module.module}".endswith(f".{owner}")):
            continue
        rank = adapter.settings.rank(module.module)
        if (
            parameter_change(module, base.checkpoint[name].shape, rank, 0.0, torch.float32, base.model_type)
            is not None
        ):
            fitting.append(name)
    return fitting[0] if len(set(fitting)) == 1 else None


def _lost(names: BaseNames, name: str) -> str:
    near = names.near(name)
    return name.removesuffix(".weight") + (f" (it has {' and '.join(near)})" if near else "")


def _require_weights(adapters: Sequence[LoraAdapter], weights: Sequence[float], combination: Combination) -> None:
    for adapter, weight in zip(adapters, weights):
        if adapter.settings.use_dora and (weight != 1 or len(adapters) > 1 or combination.kind != SUM):
            raise UsageError(
                f"{adapter.path} is a DoRA adapter: it sets the length of each row of the merged weights, so it has "
                "no weight and no sum with another adapter. Merge it alone."
            )


def _require_all_layers(base: Base, adapter: LoraAdapter) -> None:
    """An adapter that has a module in some layers has it in every layer that its settings choose."""
    present = {module.module for module in adapter.modules}
    if not present <= {name.removesuffix(".weight") for name in base.checkpoint.tensors}:
        return
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", module) for module in present}
    missing = [
        module
        for module in (name.removesuffix(".weight") for name in base.checkpoint.tensors if name.endswith(".weight"))
        if module not in present
        and re.sub(r"\.\d+(?=\.|$)", ".*", module) in patterns
        and adapter.settings.targets(module)
    ]
    if missing:
        raise AdapterError(
            _listed(f"{adapter.path} is incomplete: its settings name modules that it has no tensors for:", missing)
        )


def _settle_ties(
    tied: TiedHead | None,
    touched: dict[str, _Touched],
    tensors: Mapping[str, TensorRef],
    adapters: Sequence[LoraAdapter],
    untie: bool,
) -> TiedHead | None:
    """The head to write apart, or None. Changes that are one for both places are kept once."""
    if tied is None:
        return None
    head, embedding = touched.get(tied.head), touched.get(tied.embedding)
    if head is None and (embedding is None or not (embedding.pairs or embedding.whole)):
        return None
    if head is not None and embedding is not None and _one_change(head, embedding):
        del touched[tied.head]
        return None
    if head is None and embedding is not None:
        places = {place for place, _ in (*embedding.pairs, *embedding.whole)}
        grown = any(ref.shape != tensors[tied.embedding].shape for _, ref in embedding.whole)
        if grown or all(adapters[place].settings.ensure_weight_tying for place in places):
            return None
    if not untie:
        where = "head" if embedding is None else "token embedding" if head is None else "head and the token embedding"
        raise AdapterError(
            f"The adapter changes the {where} of a base that keeps both in one matrix ({tied.embedding}); merged into "
            "it, the change would act in both places, which is not the model that was trained.\n"
            f"  Pass --untie to write the head as a matrix of its own ({tied.head}, "
            f"{tensors[tied.embedding].nbytes:,} bytes more)."
        )
    if embedding is not None and embedding.tokens:
        # peft trains single rows of tied places together.
        touched.setdefault(tied.head, _Touched()).tokens.extend(embedding.tokens)
    touched.setdefault(tied.head, _Touched())
    return tied


def _one_change(head: _Touched, embedding: _Touched) -> bool:
    """Whether the head is changed exactly as the embedding is."""
    if bool(head.whole) != bool(embedding.whole) or len(head.pairs) != len(embedding.pairs):
        return False
    whole = [ref for _, ref in (*head.whole, *embedding.whole)]
    same_whole = all(same_bits(whole[0].read(), ref.read()) for ref in whole[1:])
    return same_whole and all(
        torch.equal(a.a.read(), b.b.read().T) and torch.equal(a.b.read(), b.a.read().T)
        for (_, a), (_, b) in zip(head.pairs, embedding.pairs)
        if b.embedding and not a.embedding
    )


@dataclass(frozen=True)
class _Context:
    base: Base
    adapters: Sequence[LoraAdapter]
    weights: Sequence[float]
    combination: Combination
    quantized: str | None

    def edits(self, touched: Mapping[str, _Touched], untied: TiedHead | None) -> tuple[dict[str, Edit], list[str]]:
        """(edit by tensor, what cannot be done)."""
        edits: dict[str, Edit] = {}
        problems: list[str] = []
        tensors = self.base.checkpoint.tensors
        if self.quantized:
            for name, ref in tensors.items():
                if is_quantized_layer(name, ref.shape):
                    module = name.removesuffix(".weight")
                    edits[name] = Edit(
                        (self.quantized,), quantized=self.quantized, flipped=is_conv1d(module, self.base.model_type)
                    )
        for name, found in touched.items():
            own_head = untied is not None and name == untied.head
            ref = tensors[untied.embedding] if own_head and untied is not None else tensors[name]
            try:
                edits[name] = self._edit(found, ref, edits.get(name))
            except AdapterError as error:
                problems.append(str(error))
        return edits, problems

    def _edit(self, found: _Touched, ref: TensorRef, quantized: Edit | None) -> Edit:
        replacement = _single(found.whole)
        shape = replacement.shape if replacement is not None else ref.shape
        if replacement is not None and shape != ref.shape and (len(shape) != 2 or shape[1:] != ref.shape[1:]):
            raise AdapterError(f"{replacement.name} is {list(shape)}, the base's is {list(ref.shape)}: another base")
        problem = next((text for _, module in found.pairs if (text := self._misfit(module, shape))), None)
        if problem:
            raise AdapterError(problem)
        dora = None
        flips = [self._flipped(place, module, shape) for place, module in found.pairs]
        for (_, module), flipped in zip(found.pairs, flips):
            if module.magnitude is not None:
                length = shape[1] if flipped else shape[0]
                if module.magnitude.numel != length:
                    raise AdapterError(
                        f"{module.magnitude.name} has {module.magnitude.numel} values, expected {length}"
                    )
                dora = Dora(module.magnitude, by_column=flipped)
        return Edit(
            (*found.sources, *(quantized.sources if quantized else ())),
            self._changes(found, shape, flips),
            replacement,
            dora,
            tuple((rows, tokens) for _, tokens, rows in found.tokens),
            quantized.quantized if quantized and replacement is None else None,
            quantized.flipped if quantized else False,
            stacked=bool(found.parameters) and len(shape) == 3,
        )

    def _misfit(self, module: ModuleAdapter, shape: tuple[int, ...]) -> str | None:
        return misfit(module, shape)

    def _flipped(self, place: int, module: ModuleAdapter, shape: tuple[int, ...]) -> bool:
        settings = self.adapters[place].settings
        return is_flipped(module, shape, fan_in_fan_out=settings.fan_in_fan_out, model_type=self.base.model_type)

    def _changes(
        self, found: _Touched, shape: tuple[int, ...], flips: Sequence[bool]
    ) -> Callable[[torch.dtype], Sequence[Change]]:
        def build(dtype: torch.dtype) -> Sequence[Change]:
            changes: list[Change] = []
            if found.pairs:
                parts = [
                    Weighted(
                        read_pair(module, dtype, flipped=flipped),
                        self.adapters[place].settings.scaling(module.module),
                        self.weights[place],
                        module.a.shape[0],
                    )
                    for (place, module), flipped in zip(found.pairs, flips)
                ]
                changes += combine(self.combination, parts)
            for place, module in found.parameters:
                settings = self.adapters[place].settings
                scale = settings.scaling(module.module) * self.weights[place]
                rank = settings.rank(module.module)
                change = parameter_change(module, shape, rank, scale, dtype, self.base.model_type)
                if change is not None:
                    changes.append(change)
            for place, module in found.biases:
                if module.bias is not None:
                    scale = self.adapters[place].settings.scaling(module.module) * self.weights[place]
                    changes.append(Vector(module.bias.read().to(dtype) * scale))
            return changes

        return build


def _single(whole: Sequence[tuple[int, TensorRef]]) -> TensorRef | None:
    """The one tensor that takes the base's place. Raises AdapterError when adapters bring different ones."""
    if not whole:
        return None
    first = whole[0][1]
    for _, other in whole[1:]:
        if not same_bits(first.read(), other.read()):
            raise AdapterError(f"{first.name}: two adapters bring different whole tensors for it, which have no sum")
    return first


def _stored_once(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors but for those that are another's bytes under a second name, as torch files keep tied ones."""
    seen: set[object] = set()
    kept = {}
    for name, ref in tensors.items():
        key = (ref.storage, ref.shape, ref.dtype)
        if not ref.storage or key not in seen:
            kept[name] = ref
        seen.add(key)
    return kept


def _output(name: str, ref: TensorRef, edit: Edit | None, dtype: torch.dtype | None) -> Output:
    kept = ref.dtype if dtype is None or not ref.dtype.is_floating_point else dtype
    shape = edit.replacement.shape if edit is not None and edit.replacement is not None else ref.shape
    return Output(name, shape, kept, ref, edit)


def _resized(
    base: Base, outputs: Mapping[str, Output], embedding: str | None, tied: TiedHead | None
) -> tuple[int, int] | None:
    """Rows of the vocabulary before and after. Raises CoverageError when only one of embedding and own head
    changed."""
    grown = {out.name: (out.base.shape[0], out.shape[0]) for out in outputs.values() if out.shape != out.base.shape}
    if not grown:
        return None
    sizes = set(grown.values())
    heads = [name for name in outputs if is_head_module(name.removesuffix(".weight")) and name.endswith(".weight")]
    lacking = [name for name in (*heads, *([embedding] if embedding else [])) if name not in grown]
    if len(sizes) > 1 or (lacking and tied is None):
        raise CoverageError(
            f"The adapter resizes {', '.join(grown)} but not {', '.join(lacking) or 'all alike'}: the head and the "
            "embedding must have one number of rows. Save it again with save_embedding_layers=True."
        )
    return sizes.pop()


def _follow_vocabulary(outputs: dict[str, Output], resized: tuple[int, int] | None) -> None:
    """Biases over the vocabulary grow with it, by zeros, as transformers resizes them; rows that went are cut."""
    if resized is None:
        return
    old, new = resized
    for name, out in outputs.items():
        if _OUTPUT_BIAS.fullmatch(name) and out.base.shape[-1] == old and out.shape == out.base.shape:
            shape = (*out.base.shape[:-1], new)
            ref = replace(out.base, name=f"{name} (resized)", shape=shape, storage=(), load=_padded(out.base, new))
            outputs[name] = replace(out, shape=shape, edit=Edit(("resized vocabulary",), replacement=ref))


def _padded(ref: TensorRef, length: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.nn.functional.pad(ref.read(), (0, length - ref.shape[-1]))


def _lay_out(base: Base, outputs: Mapping[str, Output], *, reorder: bool) -> dict[str, list[Output]]:
    """Tensors by output file, in the base's files and order; wide elements first where dtypes change."""
    shards: dict[str, list[Output]] = {}
    for out in outputs.values():
        source = Path(out.base.storage[0]) if out.base.storage else base.checkpoint.files[-1]
        shards.setdefault(_shard_name(source.name, base.checkpoint), []).append(out)
    if reorder:
        for found in shards.values():
            found.sort(key=lambda out: -out.dtype.itemsize)
    return shards


def _shard_name(name: str, checkpoint: Checkpoint) -> str:
    if "sharded" not in checkpoint.format:
        return "model.safetensors"
    return re.sub(r"^pytorch_model|\.bin$", lambda found: "model" if found[0] != ".bin" else ".safetensors", name)


def _append_own_head(
    shards: dict[str, list[Output]],
    tied: TiedHead,
    outputs: Mapping[str, Output],
    edits: Mapping[str, Edit],
    tensors: Mapping[str, TensorRef],
    dtype: torch.dtype | None,
) -> None:
    """Add the head, and what else the tie held together, to the file of the embedding."""
    file = next(found for found in shards.values() if any(out.name == tied.embedding for out in found))
    if tied.head not in outputs:
        head = _output(tied.head, tensors[tied.embedding], edits[tied.head], dtype)
        file.append(head)
    if tied.sets_config:
        file.extend(replace(outputs[source], name=name) for name, source in tied.aliases.items())
    file.sort(key=lambda out: -out.dtype.itemsize)


def _notes(
    adapters: Sequence[LoraAdapter],
    untied: TiedHead | None,
    resized: tuple[int, int] | None,
    touched: Mapping[str, _Touched],
) -> list[str]:
    notes = []
    if untied is not None:
        notes.append(f"The head is written apart from the token embedding, as {untied.head} (--untie).")
    if resized is not None:
        notes.append(f"The vocabulary has {resized[1]} rows after {resized[0]}, as the adapter was saved.")
    whole = sum(len(found.whole) for found in touched.values())
    if whole:
        notes.append(
            f"{whole} tensors are taken from the adapter as they are (biases, modules_to_save); no weight applies."
        )
    return notes


def _names(adapters: Sequence[LoraAdapter]) -> str:
    return ", ".join(str(adapter.path) for adapter in adapters)


def _listed(title: str, items: Sequence[str]) -> str:
    rest = f"\n      … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{title}\n      " + "\n      ".join(items[:SHOWN]) + rest
