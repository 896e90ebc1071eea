"""convert(): from an original checkpoint to a native model directory, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.checkpoints.lazy_tensors import same_bits
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.dropping import check_patterns, given_up
from weightport.converters.family import ConversionStage, SourceModel
from weightport.converters.options import ConversionOptions
from weightport.converters.plan import Plan, plan
from weightport.converters.processor import Processor, check_processor, image_sides
from weightport.converters.record import conversion_record, write_record
from weightport.converters.side_file import write_side_file
from weightport.errors import ConfigurationError
from weightport.hashing import BackgroundDigests
from weightport.tokenizers.provenance import Provenance
from weightport.writing import require_directory, whole_directory
from weightport.writing.safetensors_shards import lay_out, write_shards


@dataclass(frozen=True)
class Planned:
    """What a conversion will do: for a command line to show before the work begins.

    `processor` is what is written beside the weights, None where none is.
    """

    sources: Sources
    model: SourceModel
    plan: Plan
    processor: Processor | None

    @property
    def vocabulary(self) -> Provenance | None:
        """What the processor's tokenizer was made of."""
        return self.processor.vocabulary if self.processor is not None else None


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: where it is, what it did, and its record (as in conversion.json)."""

    directory: Path
    plan: Plan
    model: SourceModel
    record: dict[str, Any]


def prepare(sources: Sources, family: ConversionStage, options: ConversionOptions) -> Planned:
    """What converting `sources` will do; nothing is written. Raises a WeightportError naming what does not fit."""
    model = family.read(sources, options)
    made = make_plan(family, model, options)
    check_derived(made, model)
    # A vocabulary or an image size that does not fit is found in a second, not after gigabytes.
    return Planned(sources, model, made, checked_processor(family, model, sources, options))


def convert(
    sources: Sources,
    out: Path,
    family: ConversionStage,
    options: ConversionOptions,
    *,
    digests: BackgroundDigests | None = None,
    announce: Callable[[Planned], None] = lambda planned: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Conversion:
    """Convert the opened `sources` into the model directory `out`.

    `options` are of the family's own type. `digests` are of the sources' files, if hashing them has begun. `announce`
    is called once with the plan before anything is written, `advance` with the number of bytes just written. Raises a
    WeightportError with nothing written.
    """
    # What is read stays: the sources, and folders that options name (a vocabulary).
    inputs: list[str | Path | None] = [
        *(each.path for each in sources.checkpoints.values()),
        *sources.files,
        *options.paths,
    ]
    require_directory(out, overwrite=options.overwrite, inputs=inputs)
    begun = nullcontext(digests) if digests and digests.files == sources.files else None
    with begun or BackgroundDigests(sources.files) as hashed, _one_thread():
        planned = prepare(sources, family, options)
        model, made = planned.model, planned.plan
        announce(planned)
        with whole_directory(out, overwrite=options.overwrite, inputs=inputs, needs=made.nbytes) as folder:
            if planned.processor is not None:
                planned.processor.processor.save_pretrained(folder)
            family.write_companions(model, made, folder, options)
            files = write_shards(
                lay_out(made.targets, options.max_shard_bytes),
                folder,
                metadata={"total_parameters": made.parameters},
                allow_nonfinite=options.allow_nonfinite,
                advance=advance,
            ) + write_side_file(made.kept, folder, allow_nonfinite=options.allow_nonfinite, advance=advance)
            digests_read = hashed.result(sources.states)
            record = conversion_record(sources, model, made, files, digests_read, planned.vocabulary)
            write_record(folder, record)
    return Conversion(out, made, model, record)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Streaming is bound by memory and disk: torch's own threads would only take turns with the one that hashes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_plan(family: ConversionStage, model: SourceModel, options: ConversionOptions) -> Plan:
    """The plan of `model`, with what the user gave up left out. Raises CoverageError, and UsageError for a --drop that
    names nothing."""
    section = model.sections.get(MAIN, "")
    check_patterns(model.tensors, options.drop, section)
    dropped = given_up(model.tensors, options.drop, section)
    return plan(model.tensors, model.rules, family.targets(model.config), options.dtype, dropped)


def checked_processor(
    family: ConversionStage, model: SourceModel, sources: Sources, options: ConversionOptions
) -> Processor | None:
    """The model's processor, which makes what the model takes; None where none is asked for.

    Raises VocabularyError and ConfigurationError.
    """
    built = family.build_processor(model, sources, options)
    if built is not None:
        use = family.image_use(model.config, *image_sides(built.processor))
        check_processor(built.processor, model.config, use, built.end)
    return built


def check_derived(made: Plan, model: SourceModel) -> None:
    """Compare every dropped buffer with what the configuration gives: equal, or the configuration was read wrong."""
    for item in made.dropped:
        if item.derived is None:
            continue
        expected = item.derived.compute(model.config, item.ref.name)
        found = item.ref.read()
        if not same_bits(found, expected.to(found.dtype)):
            raise ConfigurationError(
                f"{item.ref.name} {list(found.shape)} is not what the model's configuration gives "
                f"({list(expected.shape)}, {item.because}).\n"
                "  The checkpoint is of a variant that this family does not know; converting would change its results."
            )
