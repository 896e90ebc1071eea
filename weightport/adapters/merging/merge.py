"""merge_lora(): LoRA adapters into a model directory, on files. No model is built, neither transformers nor peft
imported.

Tensors that no adapter touches are copied byte for byte; the others are computed in rows, in a wider dtype than they
are stored in, and rounded once. Files are laid out as the base's are.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.base.base_identity import identify
from weightport.adapters.base.base_model import Base, open_base
from weightport.adapters.base.base_record import recorded_base, recorded_quantization
from weightport.adapters.family import FamilyLookup
from weightport.adapters.merging.combination import Combination
from weightport.adapters.merging.companions import (
    RECORD,
    adapter_processor,
    adapter_records,
    adapter_tokenizer,
    changed_dtype,
    require_tokenizer_fits,
    resized_vocabulary,
    write_companions,
)
from weightport.adapters.merging.lora_targets import unresolved
from weightport.adapters.merging.merge_plan import MergePlan, plan_merge
from weightport.adapters.merging.module_names import ModuleNames, earlier_names, names_of_base
from weightport.adapters.merging.quantized import KINDS
from weightport.adapters.merging.tensor_edit import Norms, Output, edited_chunks
from weightport.adapters.merging.ties import tied_head
from weightport.adapters.merging.weights_check import WeightsCheck, WeightsProof
from weightport.adapters.reading.lora_tensors import LoraAdapter, open_adapter
from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import AdapterError, UsageError
from weightport.file_state import require_unchanged
from weightport.hashing import BackgroundDigests, FileDigest
from weightport.integrity.file_hashes import require_recorded
from weightport.integrity.known_faults import known_faults
from weightport.local_paths import shortened
from weightport.version import __version__
from weightport.writing import require_directory, whole_directory
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import Advance, WrittenFile, write_index, write_safetensors

FORMAT = 1

_COPIED_BYTES = 1 << 20
"""Bytes of an unchanged tensor that are read at a time: they are in the processor's cache when they are written."""


@dataclass(frozen=True)
class MergeOptions:
    """What a user may ask of a merge. `dtype` None keeps the base's; `quantized_base` is "nf4" or "nf4-double"."""

    dtype: torch.dtype | None = None
    combination: Combination = field(default_factory=Combination)
    untie: bool = False
    quantized_base: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Written:
    """A merge whose files are finished, but do not have their place yet: what a check may look at."""

    folder: Path
    base: Path
    adapters: tuple[LoraAdapter, ...]
    weights: tuple[float, ...]
    plan: MergePlan
    options: MergeOptions


@dataclass(frozen=True)
class Merge:
    """A finished merge. `record` is the content of merge.json."""

    directory: Path
    record: Mapping[str, Any]


def merge_lora(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    families: FamilyLookup,
    options: MergeOptions | None = None,
    *,
    digests: BackgroundDigests | None = None,
    announce: Callable[[MergePlan], None] = lambda plan: None,
    advance: Advance = lambda count: None,
    weighed: Callable[[WeightsCheck], None] = lambda proof: None,
    check: Callable[[Written], Mapping[str, Any] | None] = lambda written: None,
) -> Merge:
    """Write the model directory `base` with `adapters` (folder, weight) merged into it to the directory `out`.

    `digests` are of the base's files, if hashing them has begun. `weighed` is told how the weights as written compare
    with base and adapters computed a second time, which is always looked at. `check` sees the finished files before
    they take their place; what it returns is recorded, and what it raises leaves nothing behind. Raises AdapterError
    for an adapter that does not belong to the base or cannot be merged, CheckpointError, ConfigurationError,
    NonFiniteError, ParityError, UsageError, OutputError.
    """
    options = options or MergeOptions()
    base, out = Path(base), Path(out)
    inputs = [base, *(path for path, _ in adapters)]
    require_directory(out, overwrite=options.overwrite, inputs=inputs)
    _require_options(adapters, options)
    source = open_base(base)
    with ExitStack() as stack:
        begun = digests is not None and digests.files == source.checkpoint.files
        hashed = digests if digests and begun else stack.enter_context(BackgroundDigests(source.checkpoint.files))
        with one_thread():
            opened = [_open(Path(path)) for path, _ in adapters]
            names = names_of_base(source, opened, untie=options.untie)
            opened = [_brought_over(source, names, adapter, stack, families) for adapter in opened]
        weights = [weight for _, weight in adapters]
        identified = _identified(source, opened, hashed, names)
        plan = plan_merge(
            source,
            opened,
            weights,
            options.dtype,
            options.combination,
            options.untie,
            options.quantized_base,
            quantized_layers(opened, options.quantized_base),
            names,
        )
        tokenizer, config_changes = _configuration(source, plan, opened, options)
        folders = [adapter.path for adapter in opened]
        processor, notes = adapter_processor(folders)
        plan = replace(plan, notes=(*identified, *_known_of(source), *plan.notes, *notes))
        others = processor | adapter_records(list(zip(folders, weights)))
        announce(plan)
        needs = plan.nbytes + (1 << 20)
        with whole_directory(out, overwrite=options.overwrite, inputs=inputs, needs=needs) as folder:
            proof = WeightsProof(plan, opened, weights)
            with one_thread():
                files, tensors = _write(plan, source, folder, proof, advance)
            weighed(proof.result())
            write_companions(folder, base, tokenizer, others, source.config, config_changes)
            digests_read = hashed.result(source.checkpoint.states)
            require_recorded(base, {digest.name: digest.sha256 for digest in digests_read})
            record = _record(source, opened, adapters, plan, options, files, tensors, digests_read)
            record["weights_check"] = proof.result().record()
            _write_record(folder, record)
            verification = check(Written(folder, base, tuple(opened), tuple(weights), plan, options))
            # What the verification read is what was merged and hashed.
            for states in (source.checkpoint.states, *(adapter.states for adapter in opened)):
                require_unchanged(dict(states))
            if verification is not None:
                record = {**record, "verification": dict(verification)}
                _write_record(folder, record)
    return Merge(out, record)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread while the block runs: blocks of rows fit a core's cache, where a second thread costs more in
    waiting than it computes, and hashing takes the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _of_one_thread(watch: Callable[[memoryview], None]) -> Callable[[memoryview], None]:
    """`watch` for the thread that it is called in: torch's libraries count threads for each thread that calls them,
    and threads that wait for each other's blocks spin."""
    told = False

    def run(data: memoryview) -> None:
        nonlocal told
        if not told:
            torch.set_num_threads(1)
            told = True
        watch(data)

    return run


def _require_options(adapters: Sequence[tuple[str | Path, float]], options: MergeOptions) -> None:
    if not adapters:
        raise UsageError("Name at least one adapter.")
    for path, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"{path} has the weight {weight}; expected a number.")
    if options.quantized_base is not None and options.quantized_base not in KINDS:
        raise UsageError(f"{options.quantized_base!r} is no kind of 4-bit base; known are {', '.join(KINDS)}.")
    if options.dtype is not None and not options.dtype.is_floating_point:
        raise UsageError(f"{options.dtype} is no floating-point dtype.")


def _open(path: Path) -> LoraAdapter:
    if not path.is_dir():
        raise AdapterError(f"{path} is not an adapter: expected the folder that peft's save_pretrained wrote.")
    return open_adapter(path)


def _brought_over(
    base: Base, names: ModuleNames, adapter: LoraAdapter, stack: ExitStack, families: FamilyLookup
) -> LoraAdapter:
    """The adapter; one that has the original's module names, ported to the base's first."""
    tied = tied_head(names.space, base.checkpoint.tensors, base.model_type) if names.space is not None else None
    strangers = unresolved(names, tied, adapter)
    if not strangers or not _originals_names(base, strangers, families):
        return adapter
    from weightport.adapters.porting import port_adapter

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightport-adapter-")))
    port_adapter(adapter.path, folder / "ported", base.path, families)
    ported = open_adapter(folder / "ported")
    return replace(ported, path=adapter.path, files=adapter.files, states=adapter.states, ported=ported.path)


def _originals_names(base: Base, names: Sequence[str], families: FamilyLookup) -> bool:
    """Whether the family's rule table knows one of these modules as the original's."""
    if families.of_model_type(base.config.get("model_type")) is None:
        return False
    from weightport.adapters.porting import read_base

    rules = read_base(base.path, families).rules
    return any(next(rules.of_source(f"{name}.weight"), None) is not None for name in names)


def _identified(
    base: Base, adapters: Sequence[LoraAdapter], digests: BackgroundDigests, names: ModuleNames
) -> tuple[str, ...]:
    """What is said of how each adapter is known to belong to the base. Raises AdapterError."""
    found = []
    for adapter in adapters:
        # Hashes take as long as reading the base: they are waited for where an adapter says what they should be.
        hashes = None
        if recorded_base(adapter.path) is not None:
            hashes = [digest.sha256 for digest in digests.result() if not digest.name.endswith(".json")]
        found.append(f"{adapter.path.name} knows {identify(base, adapter, hashes, earlier_names(names, adapter))}")
    return tuple(found)


def _known_of(base: Base) -> tuple[str, ...]:
    """What is known to be wrong of the versions that wrote or trained the base."""
    trained = base.path / "training.json"
    found = known_faults(base.config, read_json(trained) if trained.is_file() else None)
    return tuple(f"warning: the base's {each.line}" for each in found)


def quantized_layers(adapters: Sequence[LoraAdapter], kind: str | None) -> frozenset[str] | None:
    """The layers that the adapters' trainings held in 4 bits of this `kind`; None where they do not say. Raises
    UsageError when they say another kind, or differ."""
    found = [known for adapter in adapters if kind and (known := recorded_quantization(adapter.path)) is not None]
    for known in found:
        if known.kind != kind:
            raise UsageError(f"--quantized-base {kind}: the adapter was trained on a base in {known.kind}.")
        if known.layers != found[0].layers:
            raise UsageError("--quantized-base: the adapters were trained with different layers in 4 bits.")
    return found[0].layers if found else None


def _configuration(
    base: Base, plan: MergePlan, adapters: Sequence[LoraAdapter], options: MergeOptions
) -> tuple[dict[str, Path], dict[str, Any]]:
    """(the adapters' tokenizer files, the changes to config.json)."""
    changes: dict[str, Any] = {}
    if plan.resized is not None:
        changes |= resized_vocabulary(base.config, *plan.resized)
    if plan.untied is not None and plan.untied.sets_config:
        changes["tie_word_embeddings"] = False
    if options.dtype is not None:
        for key, value in changed_dtype({**base.config, **changes}, str(options.dtype).removeprefix("torch.")).items():
            changes[key] = value
    tokenizer: dict[str, Path] = {}
    for adapter in adapters:
        found = adapter_tokenizer(adapter.path)
        if (
            found
            and tokenizer
            and any(found[n].read_bytes() != p.read_bytes() for n, p in tokenizer.items() if n in found)
        ):
            raise AdapterError(
                f"{adapter.path} and another adapter bring different tokenizers. One model has one; remove the "
                "tokenizer files from all adapters but one."
            )
        tokenizer = tokenizer or found
        if found and plan.embedding_rows is not None:
            require_tokenizer_fits(found, plan.embedding_rows, adapter.path, base.config)
    return tokenizer, changes


def _write(
    plan: MergePlan, base: Base, folder: Path, proof: WeightsProof, advance: Advance
) -> tuple[list[WrittenFile], dict[str, dict[str, Any]]]:
    """Write every shard and the index, each shard under the eyes of `proof`; returns the files and, by name, what
    became of each changed tensor."""
    files: list[WrittenFile] = []
    changed: dict[str, dict[str, Any]] = {}
    for shard, outputs in plan.shards.items():
        norms = {out.name: Norms() for out in outputs}
        tensors = [_outgoing(out, norms[out.name]) for out in outputs]
        watch = _of_one_thread(proof.shard(shard))
        files.append(write_safetensors(tensors, folder / shard, advance=advance, watch=watch))
        changed |= {out.name: _change(out, norms[out.name]) for out in outputs if out.edit is not None}
    if len(plan.shards) > 1:
        metadata = (base.checkpoint.document or {}).get("weights", {}).get("metadata", {})
        names = {shard: [out.name for out in outputs] for shard, outputs in plan.shards.items()}
        write_index(folder, names, plan.nbytes, metadata)
    return files, changed


def _outgoing(out: Output, norms: Norms) -> Outgoing:
    """The tensor as a writer takes it; `norms` are filled in while it is written."""
    if out.copied:
        return Outgoing(out.name, out.shape, out.dtype, lambda: out.base.pieces(_COPIED_BYTES))
    if out.edit is None:
        return Outgoing.of(out.name, out.base, out.dtype)
    return Outgoing(out.name, out.shape, out.dtype, lambda: edited_chunks(out, norms))


def _change(out: Output, norms: Norms) -> dict[str, Any]:
    """What merge.json says of a changed tensor: Frobenius norm of the change, that share of the base's norm, and the
    largest change of one element."""
    found: dict[str, Any] = {"from": list(out.edit.sources) if out.edit else []}
    if norms.comparable:
        norm, base = math.sqrt(norms.change), math.sqrt(norms.base)
        found |= {"change": norm, "share": norm / base if base else None, "largest": norms.largest}
    else:
        found |= {"resized": {"from": list(out.base.shape), "to": list(out.shape)}}
    return found


def _record(
    base: Base,
    adapters: Sequence[LoraAdapter],
    given: Sequence[tuple[str | Path, float]],
    plan: MergePlan,
    options: MergeOptions,
    files: Sequence[WrittenFile],
    changed: Mapping[str, Mapping[str, Any]],
    digests: Sequence[FileDigest],
) -> dict[str, Any]:
    earlier = base.path / RECORD
    outputs = [out for outputs in plan.shards.values() for out in outputs]
    return {
        "format": FORMAT,
        "base": {
            "name": base.path.resolve().name,
            "files": [asdict(digest) for digest in digests],
            **({"merged": read_json(earlier)} if earlier.is_file() else {}),
        },
        "adapters": [
            {
                "name": adapter.path.resolve().name,
                "weight": weight,
                "files": [asdict(digest) for digest in _digests(adapter)],
                "method": adapter.settings.method,
                "rank": adapter.settings.stated[0],
                "alpha": adapter.settings.stated[1],
                "rslora": adapter.settings.use_rslora,
                "dora": adapter.settings.use_dora,
                "modules": len(adapter.targets),
                "base_model": _public(adapter.settings.base_model),
            }
            for adapter, (_, weight) in zip(adapters, given)
        ],
        "combination": {key: value for key, value in asdict(options.combination).items() if value is not None},
        "quantized_base": options.quantized_base,
        "dtype": str(options.dtype).removeprefix("torch.") if options.dtype else None,
        "untied": plan.untied.head if plan.untied else None,
        "notes": list(plan.notes),
        "files": [asdict(file) for file in files],
        "changed": dict(changed),
        "added": [out.name for out in outputs if out.name not in base.checkpoint.tensors],
        "unchanged": sum(1 for out in outputs if out.copied),
        "versions": {
            "weightport": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "safetensors")},
        },
    }


def _public(base_model: str | None) -> str | None:
    """A name on the Hub as it is, of a path on the training's machine the last name: the record is published."""
    if base_model is None:
        return None
    return Path(base_model).name if Path(base_model).is_dir() else shortened(base_model)


def _digests(adapter: LoraAdapter) -> tuple[FileDigest, ...]:
    with BackgroundDigests(adapter.files) as digests:
        return digests.result(adapter.states)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
