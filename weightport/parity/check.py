"""check_parity(): every run of a reference on a converted model, and a report of what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from weightport.converters.family import ConversionStage
from weightport.errors import ReferenceFileError
from weightport.parity.compare import Comparison, Place, compare, compare_generation
from weightport.parity.correction import effect_of
from weightport.parity.evidence import Evidence, Hypotheses, evidence_of, hypotheses, tokenizer_of
from weightport.parity.family import Family
from weightport.parity.float64_arithmetic import Float64Throughout
from weightport.parity.invariance import check_invariances
from weightport.parity.loading import load_native
from weightport.parity.localisation import Localisation, last_agreeing, localise
from weightport.parity.memory import free_memory
from weightport.parity.order import forward_order, is_outcome, seam_order
from weightport.parity.originals import Originals, originals_of
from weightport.parity.own_noise import own_noise_of
from weightport.parity.passing import mark_passing
from weightport.parity.reference import Expected, Run, read_reference
from weightport.parity.report import NotCompared, ParityReport
from weightport.parity.runner import execute, native_arguments
from weightport.parity.seams import Missed, Observed, base_seam
from weightport.parity.streaming import resident_weights
from weightport.parity.training import TrainingMemory, gradient_floor, whole_gradient

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

    Every run is repeated in each of `dtypes` (by default float32 and float64) and compared with what the original gave
    in float32 and in float64. Nothing is written. Weights stay in their files and are widened one by one as the model
    takes them; what needs more memory than is free is a training step in float64, and one that does is left out by
    name unless `dtypes` asks for it. `use_cache`: generate with or without cached keys. Several attention
    implementations are each held against the reference. `invariance`: also hold every forward run against itself
    alone, behind more padding, and decoded step by step.

    Raises ReferenceFileError when the reference is malformed, of another family or version, or does not fit the model;
    CheckpointError when the directory is no model.
    """
    opened = read_reference(path)
    if opened.family != family.name:
        raise ReferenceFileError(
            f"{path} is a reference of {opened.family!r}, but the model in {directory} is {family.name!r}."
        )
    chosen = tuple(dtypes or DTYPES)
    implementations = (
        (attn_implementation,) if isinstance(attn_implementation, str) else attn_implementation or (None,)
    )
    comparisons: list[Comparison] = []
    missed: dict[NotCompared, None] = {}
    places: dict[tuple[str, str, str], Localisation] = {}
    order = forward_order(family, opened)
    memory, left_out, corrected = TrainingMemory(), dict[str, str](), ""
    evidence, tokenizer = Evidence(), tokenizer_of(directory)
    texts: dict[str, Hypotheses] = {}
    with _exact_arithmetic():
        for dtype, attention in ((dtype, attention) for dtype in chosen for attention in implementations):
            model = load_native(
                directory,
                family,
                dtype,
                overrides=family.plain,
                device=device,
                attn_implementation=attention,
                stream=True,
            )
            originals = originals_of(directory, conversion, model)
            undo = family.correction.apply(model) if family.correction else None
            for run in opened.runs:
                found: list[Comparison] = []
                if not dtypes and (short := memory.shortage(run, model)):
                    left_out[run.name] = short
                    continue
                judged = _judge(model, family, run, dtype, originals, use_cache, invariance, memory)
                for result in _in_float64(judged, family, dtype):
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
            if undo is not None and not corrected:
                corrected = effect_of(model, family, opened.runs, undo)
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
        tuple(mark_passing(comparisons, order, lambda seam: is_outcome(family, seam))),
        tuple(missed),
        {name: version(name) for name in ("weightport", "torch", "transformers")},
        order,
        (
            *(f"left out: run {name} in float64 ({why}; --dtype float64 insists)" for name, why in left_out.items()),
            *([corrected] if corrected else []),
        ),
        evidence=replace(evidence, texts=tuple(texts.values())),
    )
    first = report.first_departure
    return report if first is None else replace(report, localisation=places.get((first.run, first.seam, first.dtype)))


def _in_float64(
    judged: Iterator[Comparison | NotCompared | Generated], family: Family, dtype: torch.dtype
) -> list[Comparison | NotCompared | Generated]:
    """What a run gives, without casts to float32 in between where it is a float64 one."""
    with Float64Throughout() if family.casts_to_float32 and dtype == torch.float64 else nullcontext():
        return list(judged)


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
    memory: TrainingMemory,
) -> Iterator[Comparison | NotCompared | Generated]:
    """One run in one dtype: the seams in forward order."""
    if run.kind == "train" and dtype in HALVES:
        yield NotCompared(run.name, "loss", "losses and gradients are not compared in half precision")
        return
    wanted = _against(run, dtype)
    # `generate` takes every weight at every token: as many as half of what is free holds stay widened.
    spare = free_memory(model.device) // 2 if run.kind == "generate" else 0
    with resident_weights(model, spare), memory.measuring(run, model):
        observations = execute(model, family, run, wanted, originals, use_cache=use_cache)
    total = whole_gradient(run)
    own = own_noise_of(run, lambda seam: family.kinked(model.config, seam))
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
            floor = gradient_floor(expected, observed.value, total)
            place = Place(run.name, dtype, depth, family.noise_at(seam), floor, kinked, own.get(expected.seam))
            yield compare(observed, expected, place)
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
        yield from check_invariances(model, family, native_arguments(family, run, model), place)


def _against(run: Run, dtype: torch.dtype) -> list[Expected]:
    """What a native run in `dtype` is compared with: a float32 run with everything, a float64 one with the best there
    is."""
    if dtype != torch.float64:
        return list(run.outputs)
    exact = {each.seam for each in run.outputs if each.dtype == torch.float64}
    return [each for each in run.outputs if each.dtype == torch.float64 or each.seam not in exact]


class _exact_arithmetic:  # noqa: N801 - reads as a statement
    """float32 means float32 while the block runs: no TensorFloat-32 on a GPU."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before
