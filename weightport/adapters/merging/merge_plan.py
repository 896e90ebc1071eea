"""plan_merge(): every tensor of the merged model, with what happens to it, before a byte is written.

Whatever cannot be done is listed in one error: modules that the base does not have, pairs that do not fit, adapters
that lack layers, changes to one of two tied places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from weightport.adapters.base.base_model import Base
from weightport.adapters.merging.combination import SUM, Combination, check_combination
from weightport.adapters.merging.lora_targets import Touched, gather, listed, names_of, require_all_layers, settle_ties
from weightport.adapters.merging.module_names import ModuleNames, names_of_base
from weightport.adapters.merging.planned_edits import EditBuilder, largest_rank
from weightport.adapters.merging.tensor_edit import Edit, Output
from weightport.adapters.merging.ties import TiedHead, tied_head
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.checkpoints import Checkpoint, TensorRef
from weightport.errors import AdapterError, CoverageError, UsageError

WEIGHTED_SUM = Combination()
_OUTPUT_BIAS = re.compile(r"(.*\.)?(final_logits_bias|(lm_head|predictions|predictions\.decoder)\.bias)")


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write: tensors by file, in file order. `resized`: rows of the vocabulary before and after.
    `touched`: what the adapters say, by stored tensor."""

    shards: Mapping[str, tuple[Output, ...]]
    notes: tuple[str, ...] = ()
    resized: tuple[int, int] | None = None
    untied: TiedHead | None = None
    embedding_rows: int | None = None
    touched: Mapping[str, Touched] = field(default_factory=dict)
    names: ModuleNames | None = None
    combination: str = SUM

    @property
    def outputs(self) -> list[Output]:
        return [out for outputs in self.shards.values() for out in outputs]

    @property
    def nbytes(self) -> int:
        return sum(out.nbytes for out in self.outputs)


def plan_merge(
    base: Base,
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    combination: Combination = WEIGHTED_SUM,
    untie: bool = False,
    quantized_base: str | None = None,
    quantized_layers: frozenset[str] | None = None,
    names: ModuleNames | None = None,
) -> MergePlan:
    """The plan of merging `adapters` with `weights` into `base`. Raises AdapterError, CoverageError, UsageError."""
    _require_pairs(adapters, combination)
    check_combination(
        combination,
        [largest_rank(adapter) for adapter in adapters],
        rslora=any(adapter.settings.use_rslora for adapter in adapters),
    )
    _require_weights(adapters, weights, combination)
    if len(adapters) == 1:
        # peft combines one adapter by its weight alone, whatever it is asked for.
        combination = WEIGHTED_SUM
    tensors = base.checkpoint.tensors
    names = names or names_of_base(base, adapters, untie=untie)
    tied = tied_head(names.space, tensors, base.model_type) if names.space is not None else None
    touched = gather(base, names, adapters, tied)
    for adapter in adapters:
        require_all_layers(base, names, adapter)
    untied = settle_ties(tied, touched, tensors, adapters, untie)
    context = EditBuilder(base, adapters, weights, combination, quantized_base, quantized_layers)
    edits, problems = context.edits(touched, untied)
    if problems:
        raise AdapterError(listed(f"{names_of(adapters)} cannot be merged into {base.path}:", problems))
    outputs = {name: _output(name, ref, edits.get(name), dtype) for name, ref in _stored_once(tensors).items()}
    embedding, heads = names.vocabulary()
    resized = _resized(outputs, embedding, heads, tied if untied is None else None)
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
        touched,
        names,
        combination.kind,
    )


def _require_weights(adapters: Sequence[LoraAdapter], weights: Sequence[float], combination: Combination) -> None:
    for adapter, weight in zip(adapters, weights):
        if adapter.settings.use_dora and (weight != 1 or len(adapters) > 1 or combination.kind != SUM):
            raise UsageError(
                f"{adapter.path} is a DoRA adapter: it sets the length of each row of the merged weights, so it has "
                "no weight and no sum with another adapter. Merge it alone."
            )


def _require_pairs(adapters: Sequence[LoraAdapter], combination: Combination) -> None:
    for adapter in adapters:
        if adapter.deltas and combination.kind != SUM:
            raise UsageError(
                f"{adapter.path} is a {adapter.settings.method} adapter, which has no pairs; {combination.kind} "
                f"combines pairs. Use {SUM}, the exact weighted sum."
            )


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
    outputs: Mapping[str, Output], embedding: str | None, heads: Sequence[str], tied: TiedHead | None
) -> tuple[int, int] | None:
    """Rows of the vocabulary before and after. Raises CoverageError when only one of embedding and own head
    changed."""
    grown = {out.name: (out.base.shape[0], out.shape[0]) for out in outputs.values() if out.shape != out.base.shape}
    if not grown:
        return None
    sizes = set(grown.values())
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
    embedding = outputs[tied.embedding]
    for name, source in {tied.head: tied.embedding, **tied.aliases}.items():
        if name in outputs:
            continue
        if name in edits:
            file.append(_output(name, tensors[source], edits[name], dtype))
        elif source != tied.embedding or _of_vocabulary(embedding):
            if tied.sets_config:
                file.append(replace(outputs[source], name=name))
        elif tied.sets_config or embedding.edit is not None:
            # A further place of the embedding is another module, which the change of this one leaves as it was.
            file.append(_output(name, tensors[source], None, dtype))
    file.sort(key=lambda out: -out.dtype.itemsize)


def _of_vocabulary(out: Output) -> bool:
    """Whether the change is of the vocabulary, and so of every place: other rows, or single ones."""
    return out.shape != out.base.shape or (out.edit is not None and bool(out.edit.rows))


def _notes(
    adapters: Sequence[LoraAdapter],
    untied: TiedHead | None,
    resized: tuple[int, int] | None,
    touched: Mapping[str, Touched],
) -> list[str]:
    notes = []
    if untied is not None:
        notes.append(f"The head is written apart from the token embedding, as {untied.head} (--untie).")
    if resized is not None:
        notes.append(f"The vocabulary has {resized[1]} rows after {resized[0]}, as the adapter was saved.")
    twice = sum(change.times == 2 for found in touched.values() for change in found.pairs)
    if twice:
        notes.append(
            f"peft adds the pair of MultiheadAttention's out_proj twice, while it trains too: so does the merge, "
            f"{twice} times."
        )
    whole = sum(len(found.whole) for found in touched.values())
    if whole:
        notes.append(
            f"{whole} tensors are taken from the adapter as they are (biases, modules_to_save); no weight applies."
        )
    rows = sum(len(indices) for found in touched.values() for _, _, indices in found.tokens)
    if rows:
        notes.append(
            f"{rows} rows of embeddings take the place of the base's, as they were trained; no weight applies."
        )
    return notes
