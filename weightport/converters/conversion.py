"""convert(): from an original checkpoint to a native model directory, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.checkpoints import Checkpoint, open_checkpoint
from weightport.checkpoints.hashing import BackgroundDigests
from weightport.converters.family import Family, Options, SourceModel
from weightport.converters.patterns import Pattern
from weightport.converters.plan import Plan, plan
from weightport.converters.record import conversion_record, write_record
from weightport.errors import ConfigurationError, OutputError
from weightport.families.recognition import recognise
from weightport.writing.safetensors_shards import lay_out, same_bits, write_shards
from weightport.writing.whole_output import check_absent, whole_directory


@dataclass(frozen=True)
class Planned:
    """What a conversion will do: for a command line to show before the work begins."""

    checkpoint: Checkpoint
    model: SourceModel
    plan: Plan


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: where it is, what it did, and its record (as in conversion.json)."""

    directory: Path
    plan: Plan
    model: SourceModel
    record: dict[str, Any]


def convert(
    source: str | Path,
    out: str | Path,
    family: str | None = None,
    options: Options | None = None,
    *,
    digests: BackgroundDigests | None = None,
    announce: Callable[[Planned], None] = lambda planned: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Conversion:
    """Convert the checkpoint at `source` into the model directory `out`.

    `family` None recognises it from the tensors. `digests` are of the source's files, if hashing them has begun.
    `announce` is called once with the plan before anything is written, `advance` with the number of bytes just
    written. Raises a WeightportError with nothing written.
    """
    options = options or Options()
    out = Path(out)
    check_absent(out, overwrite=options.overwrite)
    checkpoint = open_checkpoint(Path(source))
    _refuse_own_source(checkpoint, out)
    begun = nullcontext(digests) if digests and digests.files == checkpoint.files else None
    with begun or BackgroundDigests(checkpoint.files) as hashed, _one_thread():
        reader = recognise(checkpoint, family)
        model = reader.read(checkpoint, options)
        made = make_plan(reader, model, options)
        check_derived(made, model)
        announce(Planned(checkpoint, model, made))
        with whole_directory(out, overwrite=options.overwrite, needs=made.nbytes) as folder:
            # Before the weights: a vocabulary that does not fit is found in a second, not after gigabytes.
            reader.write_companions(model, checkpoint, made, folder, options)
            files = write_shards(
                made,
                lay_out(made, options.max_shard_bytes),
                folder,
                allow_nonfinite=options.allow_nonfinite,
                advance=advance,
            )
            record = conversion_record(checkpoint, model, made, files, hashed.result(checkpoint.states))
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


def make_plan(family: Family, model: SourceModel, options: Options) -> Plan:
    """The plan of `model`, with what the user gave up left out. Raises CoverageError."""
    patterns = [Pattern(text) for text in options.drop]
    given_up = {
        name: f"left out on request (--drop {pattern})"
        for name in model.tensors
        for pattern in patterns
        if pattern.match(name) is not None
    }
    return plan(model.tensors, model.rules, family.targets(model.config), options.dtype, given_up)


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


def _refuse_own_source(checkpoint: Checkpoint, out: Path) -> None:
    target = out.resolve()
    for file in checkpoint.files:
        if target == file.resolve() or target in file.resolve().parents:
            raise OutputError(f"{out} holds the source checkpoint ({file.name}). Choose another output.")


def parse_dtype(text: str | None) -> torch.dtype | None:
    """float32, float16, bfloat16 or float64; None and "keep" mean every tensor's own."""
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    return None if text in (None, "keep") else names[str(text)]
