"""The public functions: each opens what it is given, looks the family up, and hands both to one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.converters.options import ConversionOptions, options_of
from weightport.errors import UsageError
from weightport.families.declaration import Family, Source
from weightport.families.registry import registry

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from weightport.adapters.extraction import Extraction
    from weightport.adapters.merging.merge import Merge, MergeOptions, Written
    from weightport.adapters.merging.merge_plan import MergePlan
    from weightport.adapters.merging.weights_check import WeightsCheck
    from weightport.adapters.porting import PortedAdapter
    from weightport.checkpoints.sources import Sources
    from weightport.converters.conversion import Conversion, Planned
    from weightport.converters.export import Export
    from weightport.generation import Answer
    from weightport.hashing import BackgroundDigests
    from weightport.integrity.findings import Verification
    from weightport.parity.report import ParityReport
    from weightport.release.checking import CheckedDirectory
    from weightport.release.contents import PublishedFile
    from weightport.release.publishing import Release, ReleaseOptions

SourcePaths = str | Path | Mapping[str, "str | Path"]
"""A checkpoint's path, or several sources by the names that the family gives them (`checkpoint` is the main one)."""


def convert(
    source: SourcePaths,
    out: str | Path,
    family: str | None = None,
    options: ConversionOptions | None = None,
    *,
    digests: BackgroundDigests | None = None,
    announce: Callable[[Planned], None] = lambda planned: None,
    advance: Callable[[int], None] = lambda count: None,
    **settings: Any,
) -> Conversion:
    """Convert the checkpoint `source` into the model directory `out`, complete or not at all.

    `family` None recognises it from the tensors. `options` are of the family's own type or ConversionOptions;
    `settings` are options by name (`vocabulary="BERT_CN_dict"`). `digests` are of the source's files, if hashing them
    has begun. `announce` is called once with the plan before anything is written, `advance` with the number of bytes
    just written. Raises a WeightportError with nothing written.
    """
    from weightport.converters.conversion import convert as run

    found, opened = open_sources(source, family)
    chosen = _chosen(found, options, settings)
    return run(opened, Path(out), found.conversion, chosen, digests=digests, announce=announce, advance=advance)


def plan_conversion(
    source: SourcePaths, family: str | None = None, options: ConversionOptions | None = None, **settings: Any
) -> Planned:
    """What `convert` would do, without writing anything."""
    from weightport.converters.conversion import prepare

    found, opened = open_sources(source, family)
    return prepare(opened, found.conversion, _chosen(found, options, settings))


def open_sources(source: SourcePaths, family: str | None = None) -> tuple[Family, Sources]:
    """(the family, the opened sources). Raises UsageError for a source that the family does not have or lacks."""
    from weightport.checkpoints import open_checkpoint
    from weightport.checkpoints.sources import MAIN, Sources

    paths = {MAIN: source} if isinstance(source, (str, Path)) else dict(source)
    if MAIN not in paths:
        raise UsageError(f"Give the main source as {MAIN!r}; found {', '.join(paths) or 'none'}.")
    main = open_checkpoint(Path(paths.pop(MAIN)))
    found = registry().recognise(main, family)
    known = {each.name: each for each in found.sources}
    for name in paths:
        if name not in known:
            names = ", ".join(each.flag for each in found.sources) or "none beside the checkpoint"
            raise UsageError(f"A checkpoint of {found.title} has no source {name!r}; it has {names}.")
    if missing := [each for each in found.sources if each.required and each.name not in paths]:
        wanted = "; ".join(f"{each.flag} ({each.help})" for each in missing)
        raise UsageError(f"A checkpoint of {found.title} is not the whole model: give {wanted}.")
    beside = {name: open_checkpoint(_local(path, known[name])) for name, path in paths.items()}
    return found, Sources({MAIN: main, **beside})


_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model")
"""What a language model's repository holds that is read."""


def _local(path: str | Path, source: Source) -> Path:
    """The path of a source, downloaded where it is a Hub id. Raises CheckpointError."""
    if not source.hub or Path(path).exists() or str(path).count("/") != 1:
        return Path(path)
    from weightport.errors import CheckpointError
    from weightport.hub import HUB_ERRORS, download_folder, reason

    try:
        return download_folder(str(path), _MODEL_FILES)
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"{source.flag}: there is no folder {path} here, and the Hub gave no repository of that name: "
            f"{reason(error)}"
        ) from error


def _chosen(family: Family, options: ConversionOptions | None, settings: Mapping[str, Any]) -> ConversionOptions:
    """The options of the family's own type."""
    given = options or ConversionOptions()
    if isinstance(given, family.options) and not settings:
        return given
    common = {each.name for each in fields(ConversionOptions)}
    own = {
        each.name: getattr(given, each.name)
        for each in fields(given)
        if each.name not in common and getattr(given, each.name) != each.default
    }
    shared = ConversionOptions(
        **{name: settings.get(name, getattr(given, name)) for name in common},
    )
    rest = {name: value for name, value in settings.items() if name not in common}
    return options_of(family.options, family.title, own | rest, shared)


def export(
    directory: str | Path,
    target: str | Path,
    *,
    part: str | None = None,
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Export:
    """Write the converted model in `directory` to `target` in its original format; nothing is written on failure.

    `part` is the source that is written, where the model was made of several; by default the main one.
    """
    from weightport.checkpoints.sources import MAIN
    from weightport.converters.export import export as run
    from weightport.converters.export import load_config

    directory = Path(directory)
    family = registry().of_directory(directory)
    return run(
        directory,
        Path(target),
        family.conversion,
        load_config(directory),
        part=part or MAIN,
        overwrite=overwrite,
        announce=announce,
        advance=advance,
    )


def check_parity(directory: str | Path, reference: str | Path, **settings: Any) -> ParityReport:
    """Hold the converted model in `directory` against a reference file of the original implementation.

    `settings` are those of `weightport.parity.check.check_parity`: dtypes, device, attn_implementation, use_cache,
    invariance. Nothing is written.
    """
    from weightport.parity.check import check_parity as run

    directory = Path(directory)
    family = registry().of_directory(directory)
    return run(directory, Path(reference), family.parity, family.conversion, **settings)


def load_native(directory: str | Path, dtype: torch.dtype | None = None, **settings: Any) -> PreTrainedModel:
    """The model of a converted directory, in evaluation mode; no code of the directory is executed."""
    from weightport.parity.loading import load_native as run

    directory = Path(directory)
    return run(directory, registry().of_directory(directory).parity, dtype, **settings)


def merge_lora(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    digests: BackgroundDigests | None = None,
    announce: Callable[[MergePlan], None] = lambda plan: None,
    advance: Callable[[int], None] = lambda count: None,
    check: Callable[[Written], Mapping[str, Any] | None] = lambda written: None,
    weighed: Callable[[WeightsCheck], None] = lambda proof: None,
) -> Merge:
    """Write the model directory `base` with `adapters` (folder, weight) merged into it to `out`.

    See `weightport.adapters.merging.merge.merge_lora`.
    """
    from weightport.adapters.merging.merge import merge_lora as run

    return run(
        base,
        adapters,
        out,
        registry(),
        options,
        digests=digests,
        announce=announce,
        advance=advance,
        check=check,
        weighed=weighed,
    )


def port_adapter(adapter: str | Path, out: str | Path, base: str | Path, *, overwrite: bool = False) -> PortedAdapter:
    """Write the LoRA adapter in the folder `adapter`, trained on the original's modules, to `out` for the native model
    of `base` (the original checkpoint, or the directory converted from it)."""
    from weightport.adapters.porting import port_adapter as run

    return run(adapter, out, base, registry(), overwrite=overwrite)


def extract_lora(
    tuned: str | Path, base: str | Path, out: str | Path, rank: int | None, **settings: Any
) -> Extraction:
    """What fine-tuning changed from the model directory `base` to `tuned`, as a LoRA adapter `out`: see
    `weightport.adapters.extraction.extract_lora` for the settings."""
    from weightport.adapters.extraction import extract_lora as run

    return run(tuned, base, out, rank, **settings)


def generate(directory: str | Path, image: str | Path | None = None, **settings: Any) -> Answer:
    """Ask the model in `directory` about `image`: see `weightport.generation.generate` for the settings."""
    from weightport.generation import generate as run

    family = registry().of_converted(Path(directory))
    if family is not None and registry().retrieval_of(Path(directory)) is not None:
        raise UsageError(
            f"{directory} is a model for image-text retrieval: it answers nothing. `weightport evaluate {directory} "
            "--data DATA --metric recall` measures it."
        )
    return run(directory, image, tasks=family.tasks if family is not None else {}, **settings)


def verify(
    directory: str | Path,
    *,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda amount: None,
) -> Verification:
    """What is wrong with a model directory, what is known of the versions that made it, and what was not checked.

    `start` is told the bytes to read, `advance` those just read. Raises CheckpointError for no model directory.
    """
    from weightport.integrity.verification import verify as run

    families = registry()
    original = families.original(Path(directory)) if not families.is_recorded(Path(directory)) else None
    return run(directory, families.of_model_type, original=original, start=start, advance=advance)


def release(
    directory: str | Path,
    options: ReleaseOptions,
    *,
    api: HfApi | None = None,
    announce: Callable[[CheckedDirectory, Sequence[PublishedFile]], None] = lambda checked, files: None,
) -> Release:
    """Check the model directory, describe it by what its records say, and upload it to the Hub."""
    from weightport.release.publishing import release as run

    return run(directory, options, registry().of_model_type, api=api, announce=announce)
