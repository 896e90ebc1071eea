"""check_parity(): every run of a reference on a converted model, and a report of what was found."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from weightport.converters.family import ConversionStage
from weightport.errors import ReferenceFileError
from weightport.parity.compare import Comparison, Place, compare, compare_generation
from weightport.parity.evidence import Evidence, Hypotheses, evidence_of, hypotheses, tokenizer_of
from weightport.parity.family import Family
from weightport.parity.invariance import INVARIANCES, check_invariances
from weightport.parity.loading import element_count, load_native
from weightport.parity.localisation import Localisation, last_agreeing, localise
from weightport.parity.noise import GRADIENT_FLOOR, scale_of
from weightport.parity.originals import Originals, originals_of
from weightport.parity.reference import Expected, Reference, Run, read_reference
from weightport.parity.report import NotCompared, ParityReport
from weightport.parity.runner import execute, native_arguments
from weightport.parity.seams import Missed, Observed, base_seam
from weightport.parity.training import GRADIENT, GRADIENT_NORM, TOTAL_NORM

DTYPES = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Generated:
    """Hypotheses of both sides: ids [batch, returned, length]."""

    original: torch.Tensor
    native: torch.Tensor


def check_parity(
    directory: Path,
    path: Path,
    family: Family,
    conversion: ConversionStage,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    device: str = "cpu",
    attn_implementation: str | Sequence[str] | None = None,
    use_cache: bool = True,
    invariance: bool = False,
) -> ParityReport:
    """Hold the converted model in `directory` against the reference file `path` of the original implementation.

    `family` is the model family's table, `conversion` knows the original's names.

    Every run is repeated in each of `dtypes` (by default float32, and float64 when it fits into memory) and compared
    with what the original gave in float32 and in float64. Nothing is written. `use_cache`: generate with or without
    cached keys. Several attention implementations are each held against the reference. `invariance`: also hold every
    forward run against itself alone, behind more padding, and decoded step by step.

    Raises ReferenceFileError when the reference is malformed, of another family or version, or does not fit the model;
    CheckpointError when the directory is no model.
    """
    opened = read_reference(path)
    if opened.family != family.name:
        raise ReferenceFileError(
            f"{path} is a reference of {opened.family!r}, but the model in {directory} is {family.name!r}."
        )
    chosen, notes = (tuple(dtypes), ()) if dtypes else _affordable(directory)
    implementations = (
        (attn_implementation,) if isinstance(attn_implementation, str) else attn_implementation or (None,)
    )
    comparisons: list[Comparison] = []
    missed: dict[NotCompared, None] = {}
    places: dict[tuple[str, str, str], Localisation] = {}
    order = _forward_order(family, opened)
    evidence, tokenizer = Evidence(), tokenizer_of(directory)
    texts: dict[str, Hypotheses] = {}
    with _exact_arithmetic():
        for dtype, attention in ((dtype, attention) for dtype in chosen for attention in implementations):
            model = load_native(
                directory, family, dtype, overrides=family.plain, device=device, attn_implementation=attention
            )
            originals = originals_of(directory, conversion, model.config)
            for run in opened.runs:
                found: list[Comparison] = []
                for result in _judge(model, family, run, dtype, originals, use_cache, invariance):
                    if isinstance(result, NotCompared):
                        missed[result] = None
                    elif isinstance(result, Generated):
                        texts.setdefault(run.name, hypotheses(run.name, result.original, result.native, tokenizer))
                    else:
                        shown = (attention or "") if len(implementations) > 1 else ""
                        found.append(replace(result, attention=shown))
                comparisons += found
                place = _place_of(model, family, run, found, order)
                if place is not None:
                    places.setdefault((place.run, place.seam, place.dtype), place)
            if not evidence.environment:
                evidence = evidence_of(directory, opened, family, model)
            del model
    if not comparisons:
        reasons = "; ".join(sorted({each.reason for each in missed}))
        raise ReferenceFileError(f"{path} holds no seam that can be compared with the model ({reasons}).")
    report = ParityReport(
        directory,
        path,
        family.name,
        opened.source,
        tuple(str(dtype).removeprefix("torch.") for dtype in chosen),
        tuple(comparisons),
        tuple(missed),
        {name: version(name) for name in ("weightport", "torch", "transformers")},
        order,
        notes,
        evidence=replace(evidence, texts=tuple(texts.values())),
    )
    first = report.first_departure
    return report if first is None else replace(report, localisation=places.get((first.run, first.seam, first.dtype)))


def _place_of(
    model: PreTrainedModel, family: Family, run: Run, found: Sequence[Comparison], order: Sequence[str]
) -> Localisation | None:
    """Where a run that departs starts to; None when it agrees."""
    place = {seam: i for i, seam in enumerate(order)}
    wrong = sorted((each for each in found if not each.verdict.passes), key=lambda c: place.get(c.seam, len(place)))
    if not wrong or run.kind == "generate":
        return None
    arguments = native_arguments(family, run, model)
    return localise(model, family, arguments, wrong[0], last_agreeing(wrong[0], found, order))


def _judge(
    model: PreTrainedModel,
    family: Family,
    run: Run,
    dtype: torch.dtype,
    originals: Originals,
    use_cache: bool,
    invariance: bool,
) -> Iterator[Comparison | NotCompared | Generated]:
    """One run in one dtype: the seams in forward order."""
    if run.kind == "train" and dtype in HALVES:
        yield NotCompared(run.name, "loss", "losses and gradients are not compared in half precision")
        return
    wanted = _against(run, dtype)
    observations = execute(model, family, run, wanted, originals, use_cache=use_cache)
    total = _whole_gradient(run)
    generated: dict[str, tuple[Observed, Expected]] = {}
    for expected in sorted(wanted, key=lambda each: seam_order(family, each.seam)):
        observed = observations[expected.tensor.name]
        if isinstance(observed, Missed):
            yield NotCompared(run.name, expected.seam, observed.reason)
        elif run.kind == "generate":
            generated[expected.seam] = observed, expected
        else:
            seam, _ = base_seam(expected.seam)
            depth, kinked = family.depth(model.config, seam), family.kinked(model.config, seam)
            floor = _floor(expected, observed, total)
            yield compare(observed, expected, Place(run.name, dtype, depth, family.noise, floor, kinked))
    if generated:
        # Searches are decided by log-probabilities, which are float32 whatever is wider.
        arithmetic = dtype if dtype in HALVES else torch.float32
        place = Place(run.name, arithmetic, family.depth(model.config, "logits"), family.noise)
        if "sequences" in generated:
            observed, expected = generated["sequences"]
            yield Generated(expected.tensor.read(), observed.value)
        observed_by = {seam: pair[0] for seam, pair in generated.items()}
        expected_by = {seam: pair[1] for seam, pair in generated.items()}
        for result in compare_generation(observed_by, expected_by, place):
            yield replace(result, dtype=str(dtype).removeprefix("torch."))
    if invariance and run.kind == "forward":
        place = Place(run.name, dtype, family.depth(model.config, "logits"), family.noise)
        yield from check_invariances(model, native_arguments(family, run, model), place)


def _against(run: Run, dtype: torch.dtype) -> list[Expected]:
    """What a native run in `dtype` is compared with: a float32 run with everything, a float64 one with the best there
    is."""
    if dtype != torch.float64:
        return list(run.outputs)
    exact = {each.seam for each in run.outputs if each.dtype == torch.float64}
    return [each for each in run.outputs if each.dtype == torch.float64 or each.seam not in exact]


def seam_order(family: Family, seam: str) -> tuple[int, int, str]:
    """Sort key that puts seams in forward order: the family's own, then losses, gradients and hypotheses."""
    name, derivation = base_seam(seam)
    for place, each in enumerate(family.seams):
        layer = each.layer_of(name)
        if layer is not None:
            return _stage(family, place, layer), int(layer or 0), f"{place:04d}{derivation}"
    later = [*family.losses, TOTAL_NORM, "sequences", "scores", "positional_scores"]
    place = later.index(name) if name in later else len(later)
    return len(family.seams) + place, 0, name


def _stage(family: Family, place: int, layer: str) -> int:
    """Seams of one stack are interleaved by layer: they share the first one's place."""
    if not layer:
        return place
    stack = family.seams[place].name.partition("*")[0]
    return next(i for i, each in enumerate(family.seams) if each.name.partition("*")[0] == stack and "*" in each.name)


def _forward_order(family: Family, reference: Reference) -> tuple[str, ...]:
    seams = {each.seam for run in reference.runs for each in run.outputs}
    return (*sorted(seams, key=lambda seam: seam_order(family, seam)), *INVARIANCES)


def _whole_gradient(run: Run) -> float:
    """Norm of the whole gradient in the reference, as far as it says; 0 when the run holds no gradient."""
    by_seam = {
        each.seam: each for each in run.outputs if each.seam == TOTAL_NORM or each.seam.startswith(GRADIENT_NORM)
    }
    if TOTAL_NORM in by_seam:
        return float(by_seam[TOTAL_NORM].tensor.read())
    if by_seam:
        return float(torch.stack([each.tensor.read().double() for each in by_seam.values()]).norm())
    gradients = [each.tensor.read().double().norm() for each in run.outputs if each.seam.startswith(GRADIENT)]
    return float(torch.stack(gradients).norm()) if gradients else 0.0


def _floor(expected: Expected, observed: Observed, total: float) -> float:
    """The smallest scale a gradient is measured against (see noise.GRADIENT_FLOOR); 0 for everything else."""
    if expected.seam.startswith(GRADIENT_NORM):
        return GRADIENT_FLOOR * total
    if expected.seam.startswith(GRADIENT):
        return max(GRADIENT_FLOOR * total / max(observed.value.numel(), 1) ** 0.5, scale_of(expected.tensor.read()))
    return 0.0


def _affordable(directory: Path) -> tuple[tuple[torch.dtype, ...], tuple[str, ...]]:
    """float32, and float64 when weights, gradients and activations in it fit into the memory that is free."""
    needed = element_count(directory) * torch.float64.itemsize * 3
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed <= free:
        return DTYPES, ()
    note = (
        f"float64 was left out: it needs about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free "
        "(--dtype float64 insists)"
    )
    return DTYPES[:1], (note,)


class _exact_arithmetic:  # noqa: N801 - reads as a statement
    """float32 means float32 while the block runs: no TensorFloat-32 on a GPU."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before
