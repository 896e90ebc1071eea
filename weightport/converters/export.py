"""export(): a converted directory back to its original format, by the same rule table read from right to left."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.checkpoints import Checkpoint, TensorRef, open_checkpoint
from weightport.checkpoints.json_text import parse_json
from weightport.checkpoints.sources import MAIN
from weightport.converters.family import ConversionStage, OriginalForm
from weightport.converters.patterns import Capture
from weightport.converters.record import CHANGED, read_record
from weightport.converters.rules import Claim, RuleTable
from weightport.converters.side_file import read_side_file
from weightport.errors import CheckpointError, CoverageError, UsageError
from weightport.model_directory import check_model_directory
from weightport.writing import require_directory, require_file, whole_directory, whole_file
from weightport.writing.npz import write_npz
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import write_safetensors
from weightport.writing.torch_archive import write_torch_archive

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


MERGE_RECORD = "merge.json"
ALL = "all"
"""As a part: the tensors of every source."""


@dataclass(frozen=True)
class Export:
    """A finished export. `lost` are the operations that could not be undone exactly, by the tensor they made.
    `left_out` says of tensors, by how their names begin, why they were not written where no record told of them."""

    path: Path
    tensors: int
    nbytes: int
    lost: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)


def export(
    directory: Path,
    target: Path,
    family: ConversionStage,
    config: PreTrainedConfig,
    *,
    part: str = MAIN,
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Export:
    """Write the model in `directory`, of this `config`, to `target` in its family's original format.

    With a conversion.json the original's tensors come back under the same names in the same order, derived and tied
    ones included; without one (a directory that a trainer saved) the layout's full set is written, but for what the
    original's trainer never trains. `part` is the source whose tensors are written, where there were several, or
    "all". Nothing is written on failure.
    """
    require = require_directory if family.original_form == "folder" else require_file
    require(target, overwrite=overwrite, inputs=[directory])
    record = read_record(directory) or {}
    source = _source_of(record, part, directory)
    checkpoint = open_checkpoint(directory)
    rules = family.rules_of(config, record.get("layout", ""))
    beside = read_side_file(directory) if part in (MAIN, ALL) else {}
    changed = changed_by_merges(directory) | set(record.get(CHANGED, ()))
    frozen = getattr(family, "frozen", {}) if part == MAIN and not record else {}
    tensors, lost = original_tensors(checkpoint, rules, config, record, part, beside, changed, frozen)
    left_out = _left_out(checkpoint, rules, tensors, frozen)
    total = sum({tensor.storage_key: tensor.nbytes for tensor in tensors}.values())
    announce(total)
    job = _Job(
        directory, target, family, config, record.get("options", {}), source, tensors, total, overwrite, advance
    )
    _WRITERS[family.original_form](job)
    return Export(target, len(tensors), total, lost, left_out)


@dataclass(frozen=True)
class _Job:
    """One export, its tensors decided."""

    directory: Path
    target: Path
    family: ConversionStage
    config: PreTrainedConfig
    options: Mapping[str, Any]
    source: Mapping[str, Any]
    tensors: Sequence[Outgoing]
    nbytes: int
    overwrite: bool
    advance: Callable[[int], None]

    def document(self) -> Mapping[str, Any]:
        """What torch.save would be given."""
        model = OrderedDict((tensor.name, tensor) for tensor in self.tensors)
        return self.family.original_document(self.config, self.options, model)


def _write_torch(job: _Job) -> None:
    with whole_file(job.target, overwrite=job.overwrite, inputs=[job.directory], needs=job.nbytes) as path:
        write_torch_archive(job.document(), path, advance=job.advance)


def _write_npz(job: _Job) -> None:
    section = str(job.source.get("section") or "")
    before = f"{section}/" if section else ""
    with whole_file(job.target, overwrite=job.overwrite, inputs=[job.directory], needs=job.nbytes) as path:
        write_npz([replace(tensor, name=before + tensor.name) for tensor in job.tensors], path, advance=job.advance)


def _write_folder(job: _Job) -> None:
    with whole_directory(job.target, overwrite=job.overwrite, inputs=[job.directory], needs=job.nbytes) as folder:
        job.family.write_original_companions(job.directory, job.config, job.options, folder)
        if str(job.source.get("format", "")).startswith("safetensors"):
            write_safetensors(job.tensors, folder / "model.safetensors", advance=job.advance)
        else:
            write_torch_archive(job.document(), folder / "pytorch_model.bin", advance=job.advance)


_WRITERS: Mapping[OriginalForm, Callable[[_Job], None]] = {
    "torch": _write_torch,
    "npz": _write_npz,
    "folder": _write_folder,
}


def _source_of(record: Mapping[str, Any], part: str, directory: Path) -> Mapping[str, Any]:
    """What the record says of the source `part`. Raises UsageError for one that it does not know."""
    sources = record.get("sources", {})
    if part != ALL and sources and part not in sources:
        known = ", ".join(sources)
        raise UsageError(f"{directory} was not made of a source {part!r}; it was made of {known} (or say {ALL}).")
    found: Mapping[str, Any] = sources.get(MAIN if part == ALL else part, {})
    return found


def original_tensors(
    checkpoint: Checkpoint,
    rules: RuleTable,
    config: PreTrainedConfig,
    record: Mapping[str, Any],
    part: str = MAIN,
    beside: Mapping[str, TensorRef] | None = None,
    changed: Set[str] = frozenset(),
    frozen: Mapping[str, str] | None = None,
) -> tuple[list[Outgoing], dict[str, str]]:
    """(the original's tensors, in the original's order where a record tells it; what is lost by tensor). `beside` are
    those that stand in the side file. What another source than `part` gave, and what has a name that begins as one of
    `frozen`, is left out, unless it is among the native tensors that were `changed` since. Raises CoverageError."""
    filled = {name for step in record.get("steps", ()) if not step["from"] for name in step["to"]}
    found, lost = _reversed_rules(checkpoint, rules, filled)
    found |= {name: Outgoing.of(name, ref, storage=name) for name, ref in (beside or {}).items()}
    recorded = {name: source["tensors"] for name, source in record.get("sources", {}).items()}
    if part == ALL:
        recorded = {ALL: {name: dtype for tensors in recorded.values() for name, dtype in tensors.items()}}
    dtypes: Mapping[str, str] = recorded.get(part, {})
    names = list(dtypes) or None
    derived = _derived_names(rules, names)
    dropped = {item["name"] for item in record.get("dropped", ())}
    absent = [name for name in names or () if name not in found and name not in derived and name not in dropped]
    if absent:
        raise CoverageError(
            f"{checkpoint.path} no longer holds what these tensors of the original came from:\n      "
            + "\n      ".join(absent[:12])
        )
    for name in derived:
        value = rules.derivation_of(name)
        if value is None:
            continue
        tensor = value.compute(config, name)
        found[name] = Outgoing.of(name, tensor, getattr(torch, dtypes[name]) if name in dtypes else None)
    elsewhere = {name for source, tensors in recorded.items() if source != part for name in tensors}
    elsewhere |= {name for name in found if name.startswith(tuple(frozen or ()))}
    if part == MAIN:
        elsewhere -= _sources_of(changed, rules)
    order = [name for name in names or found if name in found and (names or name not in elsewhere)]
    written = {found[name].storage_key for name in order}
    # What a fine-tune added stands behind what the original had; a further name of a tied tensor is nothing new.
    known = set(order) | elsewhere
    added = [name for name in found if name not in known and found[name].storage_key not in written]
    chosen = [found[name] for name in (*order, *added)]
    return chosen, {tensor.name: lost[tensor.name] for tensor in chosen if tensor.name in lost}


def changed_by_merges(directory: Path) -> frozenset[str]:
    """Native tensors that merges of adapters have changed since the conversion, by the directory's merge.json and what
    it holds of earlier merges; none where there is none. Raises CheckpointError for a malformed one."""
    path = directory / MERGE_RECORD
    if not path.is_file():
        return frozenset()
    try:
        record = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    found: set[str] = set()
    while isinstance(record, Mapping):
        found |= {str(name) for key in ("changed", "added") for name in record.get(key) or ()}
        base = record.get("base")
        record = base.get("merged") if isinstance(base, Mapping) else None
    return frozenset(found)


def _left_out(
    checkpoint: Checkpoint, rules: RuleTable, tensors: Sequence[Outgoing], frozen: Mapping[str, str]
) -> dict[str, str]:
    """Why tensors whose names begin as one of `frozen` are not among those that are written, where some are not."""
    own, written = _sources_of(set(checkpoint), rules), {tensor.name for tensor in tensors}
    return {
        start: why
        for start, why in frozen.items()
        if any(name.startswith(start) and name not in written for name in own)
    }


def _sources_of(native: Set[str], rules: RuleTable) -> set[str]:
    """The original's names of what makes these native tensors."""
    claims = (next(rules.of_target(name), None) for name in native)
    return {name for claim in claims if claim is not None for name in claim.rule.source_names(claim.captures)}


def _reversed_rules(
    checkpoint: Checkpoint, rules: RuleTable, filled: Set[str]
) -> tuple[dict[str, Outgoing], dict[str, str]]:
    """(the original's tensors by name, what their operation cannot restore). Raises CoverageError."""
    groups: dict[tuple[int, tuple[Capture, ...]], list[tuple[Claim, TensorRef]]] = {}
    unknown = []
    for name, ref in checkpoint.items():
        if rules.filling_of(name) is not None or name in filled:
            continue
        claim = next(rules.of_target(name), None)
        if claim is None:
            unknown.append(name)
            continue
        groups.setdefault(claim.group, []).append((claim, ref))
    if unknown:
        raise CoverageError(
            f"{len(unknown)} tensors of {checkpoint.path} have no place in the original format:\n      "
            + "\n      ".join(unknown[:12])
        )
    found: dict[str, Outgoing] = {}
    lost: dict[str, str] = {}
    for claims in groups.values():
        rule, captures = claims[0][0].rule, claims[0][0].captures
        layers = 1 + max(claim.layer for claim, _ in claims)
        present = {ref.name: ref for _, ref in claims}
        wanted = rule.target_names(captures, layers) if layers <= len(claims) else []
        absent = [name for name in wanted if name not in present]
        if absent or not wanted:
            named = ", ".join(absent) or f"layers of {rule.targets[0]}"
            raise CoverageError(f"{checkpoint.path} lacks {named}, which the original format needs.")
        try:
            made = rule.operation.backward([present[name] for name in wanted])
        except ValueError as error:
            raise CoverageError(
                f"{checkpoint.path}: {wanted[0]}: {rule.operation.name} cannot be undone: {error}"
            ) from error
        names = rule.source_names(captures, max(1, len(made) // len(rule.sources)))
        for name, tensor in zip(names, made, strict=True):
            found[name] = Outgoing.of(name, tensor, storage=names[0] if name == names[0] else name)
            if rule.operation.lossy:
                lost[name] = rule.operation.lossy
        for alias in rule.alias_names(captures):
            found[alias] = Outgoing.of(alias, made[0], storage=names[0])
    return found, lost


def _derived_names(rules: RuleTable, recorded: list[str] | None) -> list[str]:
    """Names of the tensors to recompute: those the source had, or without a record every one the layout has."""
    if recorded is not None:
        return [name for name in recorded if rules.derivation_of(name) is not None]
    return [name for row in rules.derived if not row.optional for name in row.source.expand()]


def load_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a converted directory. Raises CheckpointError."""
    import transformers

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    path = directory / "config.json"
    check_model_directory(directory)
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a model configuration: {error}") from error
