"""export(): a converted directory back to its original format, by the same rule table read from right to left."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.checkpoints import Checkpoint, TensorRef, open_checkpoint
from weightport.converters.family import Family, HubFamily
from weightport.converters.patterns import Capture
from weightport.converters.plan import TensorSpec
from weightport.converters.record import read_record
from weightport.converters.rules import Rule, RuleTable
from weightport.errors import CheckpointError, CoverageError, UnknownFamilyError
from weightport.families import FAMILIES
from weightport.writing import require_directory, require_file, whole_directory, whole_file
from weightport.writing.safetensors_shards import HashedFile, as_bytes, chunks, safetensors_header
from weightport.writing.torch_archive import StreamedTensor, write_torch_archive

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original format: its name there, and how its values come about."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    values: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Export:
    """A finished export."""

    path: Path
    tensors: int
    nbytes: int


def export(
    directory: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Export:
    """Write the model in `directory` to `target` in its family's original format. Nothing is written on failure.

    With a conversion.json the original's tensors come back under the same names in the same order, derived and tied
    ones included; without one (a directory that a trainer saved) the layout's full set is written.
    """
    directory, target = Path(directory), Path(target)
    config = load_config(directory)
    family = family_of(config, directory)
    require = require_directory if isinstance(family, HubFamily) else require_file
    require(target, overwrite=overwrite, inputs=[directory])
    record = read_record(directory)
    checkpoint = open_checkpoint(directory)
    rules = family.rules_of(config, (record or {}).get("layout", ""))
    tensors = original_tensors(checkpoint, rules, config, record)
    total = sum({t.key: torch.Size(t.shape).numel() * t.dtype.itemsize for t in tensors}.values())
    announce(total)
    model = OrderedDict((t.name, StreamedTensor(t.key, t.shape, t.dtype, _parts(t))) for t in tensors)
    source = (record or {}).get("source", {})
    document = family.original_document(config, source.get("options", {}), model)
    if not isinstance(family, HubFamily):
        with whole_file(target, overwrite=overwrite, inputs=[directory], needs=total) as path:
            write_torch_archive(document, path, advance=advance)
    else:
        with whole_directory(target, overwrite=overwrite, inputs=[directory], needs=total) as folder:
            family.write_original_companions(directory, config, source.get("options", {}), folder)
            if str(source.get("format", "")).startswith("safetensors"):
                _write_safetensors(tensors, folder / "model.safetensors", advance)
            else:
                write_torch_archive(document, folder / "pytorch_model.bin", advance=advance)
    return Export(target, len(tensors), total)


def original_tensors(
    checkpoint: Checkpoint, rules: RuleTable, config: PreTrainedConfig, record: Mapping[str, Any] | None
) -> list[OriginalTensor]:
    """The original's tensors, in the original's order where a record tells it. Raises CoverageError."""
    filled = {name for step in (record or {}).get("steps", ()) if not step["from"] for name in step["to"]}
    found = {tensor.name: tensor for tensor in _reversed_rules(checkpoint, rules, filled)}
    names = list((record or {}).get("source_tensors", {})) or None
    dtypes = (record or {}).get("source_tensors", {})
    derived = _derived_names(rules, names)
    missing = [name for name in names or () if name not in found and name not in derived]
    dropped = {item["name"]: item["because"] for item in (record or {}).get("dropped", ())}
    lost = [name for name in missing if name not in dropped]
    if lost:
        raise CoverageError(
            f"{checkpoint.path} no longer holds what these tensors of the original came from:\n      "
            + "\n      ".join(lost[:12])
        )
    for name in derived:
        value = rules.derivation_of(name)
        if value is None:
            continue
        tensor = value.compute(config, name)
        dtype = getattr(torch, dtypes[name]) if name in dtypes else tensor.dtype
        found[name] = OriginalTensor(name, tuple(tensor.shape), dtype, name, _constant(tensor.to(dtype)))
    order = [name for name in names or found if name in found]
    written = {found[name].key for name in order}
    # What a fine-tune added stands behind what the original had; a further name of a tied tensor is nothing new.
    added = [name for name in found if name not in set(order) and found[name].key not in written]
    return [found[name] for name in (*order, *added)]


def _write_safetensors(tensors: Sequence[OriginalTensor], path: Path, advance: Callable[[int], None]) -> None:
    """The tensors in one safetensors file, in their order; what is tied is written under each of its names."""
    with HashedFile(path) as out:
        out.write(safetensors_header([TensorSpec(t.name, t.shape, t.dtype) for t in tensors]))
        for tensor in tensors:
            for chunk in chunks(tensor.values(), tensor.dtype):
                out.write(as_bytes(chunk))
                advance(chunk.numel() * chunk.element_size())


def _reversed_rules(checkpoint: Checkpoint, rules: RuleTable, filled: Set[str]) -> Iterator[OriginalTensor]:
    groups: dict[tuple[int, tuple[Capture, ...]], tuple[Rule, dict[int, TensorRef]]] = {}
    unknown = []
    for name, ref in checkpoint.items():
        if rules.filling_of(name) is not None or name in filled:
            continue
        claim = next(rules.of_target(name), None)
        if claim is None:
            unknown.append(name)
            continue
        rule, place, captures = claim
        groups.setdefault((id(rule), captures), (rule, {}))[1][place] = ref
    if unknown:
        raise CoverageError(
            f"{len(unknown)} tensors of {checkpoint.path} have no place in the original format:\n      "
            + "\n      ".join(unknown[:12])
        )
    for (_, captures), (rule, refs) in groups.items():
        targets = [refs.get(place) for place in range(len(rule.targets))]
        if any(ref is None for ref in targets):
            absent = [p.fill(captures) for place, p in enumerate(rule.targets) if place not in refs]
            raise CoverageError(f"{checkpoint.path} lacks {', '.join(absent)}, which the original format needs.")
        present = [ref for ref in targets if ref is not None]
        shapes = rule.operation.backward([torch.empty(r.shape, dtype=r.dtype, device="meta") for r in present])
        for place, shape in enumerate(shapes):
            first = rule.sources[place].fill(captures)
            names = [first, *(alias.fill(captures) for alias in rule.aliases)] if place == 0 else [first]
            for name in names:
                yield OriginalTensor(name, tuple(shape.shape), shape.dtype, first, _backward(rule, present, place))


def _derived_names(rules: RuleTable, recorded: list[str] | None) -> list[str]:
    """Names of the tensors to recompute: those the source had, or without a record every one the layout has."""
    if recorded is not None:
        return [name for name in recorded if rules.derivation_of(name) is not None]
    return [name for row in rules.derived if not row.optional for name in row.source.expand()]


def _backward(rule: Rule, refs: list[TensorRef], place: int) -> Callable[[], torch.Tensor]:
    return lambda: rule.operation.backward([ref.read() for ref in refs])[place]


def _constant(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _parts(tensor: OriginalTensor) -> Callable[[], Iterator[torch.Tensor]]:
    return lambda: chunks(tensor.values(), tensor.dtype)


def load_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a converted directory. Raises CheckpointError."""
    import transformers

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json.")
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a model configuration: {error}") from error


def family_of(config: PreTrainedConfig, directory: Path) -> Family:
    """The family whose native model this is. Raises UnknownFamilyError."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnknownFamilyError(
            f"{directory} holds a {config.model_type!r} model; known families: {', '.join(FAMILIES)}."
        )
    return family
