"""plan(): every target tensor as an operation on named sources, and every source tensor accounted for.

A plan is complete or it is not made: what is missing, left over, claimed twice or of the wrong shape is listed in one
error. It costs no reading: operations run on meta tensors to learn shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightport.checkpoints import TensorRef
from weightport.converters.native import NativeTensors
from weightport.converters.operations import Copy
from weightport.converters.patterns import Capture
from weightport.converters.rules import Derived, Filled, Rule, RuleTable
from weightport.errors import CoverageError

SHOWN = 12
"""How many names an error lists before it counts the rest."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: `dtype` is what stands in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """One application of a rule. `aliases` are equal copies of the first source, to be compared, not written."""

    rule: Rule | Filled
    sources: tuple[TensorRef, ...]
    aliases: tuple[TensorRef, ...]
    targets: tuple[TensorSpec, ...]

    @property
    def operation(self) -> str:
        if isinstance(self.rule, Filled):
            return "compute" if self.rule.compute is not None else f"fill {self.rule.value:g}"
        return self.rule.operation.name

    @property
    def copies(self) -> bool:
        """Whether the one target is the one source, value for value."""
        return isinstance(self.rule, Rule) and isinstance(self.rule.operation, Copy)

    def produce(self) -> Sequence[torch.Tensor]:
        """The targets' values, in the sources' dtype."""
        if isinstance(self.rule, Filled):
            if self.rule.compute is not None:
                return [self.rule.compute(spec.shape) for spec in self.targets]
            return [torch.full(spec.shape, self.rule.value, dtype=spec.dtype) for spec in self.targets]
        return self.rule.operation.forward([ref.read() for ref in self.sources])


@dataclass(frozen=True)
class DroppedTensor:
    """A source tensor that is not written. `derived` ones are compared with what the configuration gives first."""

    ref: TensorRef
    because: str
    derived: Derived | None = None


@dataclass(frozen=True)
class Plan:
    """What conversion will do, before it does it."""

    steps: tuple[Step, ...]
    dropped: tuple[DroppedTensor, ...]
    buffers: frozenset[str] = frozenset()

    @property
    def targets(self) -> Iterator[TensorSpec]:
        return (spec for step in self.steps for spec in step.targets)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.targets)

    @property
    def parameters(self) -> int:
        """Elements of the model's parameters; tied ones count once, buffers (batch statistics) do not."""
        return sum(torch.Size(spec.shape).numel() for spec in self.targets if spec.name not in self.buffers)


def plan(
    sources: Mapping[str, TensorRef],
    rules: RuleTable,
    native: NativeTensors,
    dtype: torch.dtype | None = None,
    drop: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve `rules` against a checkpoint's tensors and a model's own parameter list.

    `native` is every tensor the model loads. `dtype` is what floating-point
    tensors are written in; by default each keeps its own. `drop` names source tensors the user gave up, and why.

    Raises CoverageError, naming every tensor, unless each source is used or dropped and each target is produced once
    with its exact shape.
    """
    targets = native.shapes
    steps: list[Step] = []
    dropped: list[DroppedTensor] = []
    surplus: list[str] = []
    groups: dict[tuple[int, tuple[Capture, ...]], tuple[Rule, dict[int, TensorRef]]] = {}

    for name, ref in sources.items():
        if drop and name in drop:
            dropped.append(DroppedTensor(ref, drop[name]))
            continue
        claims = list(rules.of_source(name))
        if len(claims) > 1:
            claimants = " and ".join(str(rule.sources[0]) for rule, _, _ in claims)
            raise CoverageError(f"The rule table claims {name} twice: by {claimants}.")
        if claims:
            rule, place, captures = claims[0]
            groups.setdefault((id(rule), captures), (rule, {}))[1][place] = ref
        elif (derived := rules.derivation_of(name)) is not None:
            dropped.append(DroppedTensor(ref, derived.because, derived))
        elif (row := rules.drop_of(name)) is not None:
            dropped.append(DroppedTensor(ref, row.because))
        else:
            surplus.append(f"{name} {list(ref.shape)}")

    missing: list[str] = []
    reshaped: list[str] = []
    produced: dict[str, Step] = {}
    for (_, captures), (rule, refs) in groups.items():
        absent = [p.fill(captures) for place, p in enumerate(rule.sources) if place not in refs]
        if absent:
            missing += absent
            continue
        step = _apply(rule, captures, refs, targets, dtype, reshaped)
        for spec in step.targets:
            if spec.name in produced:
                raise CoverageError(f"The rule table produces {spec.name} twice.")
            produced[spec.name] = step
            if spec.name not in targets:
                surplus += [
                    f"{ref.name} {list(ref.shape)} (would become {spec.name}, which the model does not have)"
                    for ref in step.sources
                ]
        steps.append(step)

    float_dtype = dtype or _main_dtype(steps)
    for name, shape in targets.items():
        if name in produced:
            continue
        filling = rules.filling_of(name)
        if filling is not None:
            steps.append(Step(filling, (), (), (TensorSpec(name, shape, filling.dtype or float_dtype),)))
            continue
        claims = list(rules.of_target(name))
        wanted = [p.fill(claims[0][2]) for p in claims[0][0].sources] if claims else []
        absent = [source for source in wanted if source not in sources]
        if not set(absent) & set(missing):
            missing.append(f"{', '.join(absent) or 'nothing in the file'} {list(shape)} → {name}")

    if missing or surplus or reshaped:
        raise CoverageError(_complaint(missing, surplus, reshaped))
    return Plan(tuple(steps), tuple(dropped), native.buffers)


def _apply(
    rule: Rule,
    captures: tuple[Capture, ...],
    refs: Mapping[int, TensorRef],
    targets: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    reshaped: list[str],
) -> Step:
    """The rule's step for one set of captures; a shape that does not fit is added to `reshaped`."""
    count = len(rule.sources)
    sources = tuple(refs[place] for place in range(count))
    aliases = tuple(ref for place, ref in sorted(refs.items()) if place >= count)
    names = [pattern.fill(captures) for pattern in rule.targets]
    wanted = [targets.get(name) for name in names]
    for alias in aliases:
        if alias.shape != sources[0].shape:
            reshaped.append(
                f"{alias.name} is {list(alias.shape)}, but its tied copy {sources[0].name} {list(sources[0].shape)}"
            )
    try:
        outputs = rule.operation.forward([torch.empty(ref.shape, dtype=ref.dtype, device="meta") for ref in sources])
    except (ValueError, RuntimeError, IndexError) as error:
        found = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in sources)
        reshaped.append(f"{found}: {rule.operation.name} does not apply ({error})")
        return Step(
            rule, sources, aliases, tuple(TensorSpec(n, w or (), torch.float32) for n, w in zip(names, wanted))
        )
    specs = []
    for name, want, out in zip(names, wanted, outputs):
        if want is not None and tuple(out.shape) != tuple(want):
            found = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in sources)
            reshaped.append(f"{found} → {name}: the model has {list(want)}, the file gives {list(out.shape)}")
        specs.append(TensorSpec(name, tuple(out.shape), dtype if dtype and out.dtype.is_floating_point else out.dtype))
    return Step(rule, sources, aliases, tuple(specs))


def _main_dtype(steps: Sequence[Step]) -> torch.dtype:
    """The floating-point dtype that most bytes are written in."""
    sizes: dict[torch.dtype, int] = {}
    for step in steps:
        for spec in step.targets:
            if spec.dtype.is_floating_point:
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def main_dtype(made: Plan) -> torch.dtype:
    """The floating-point dtype that most of a plan's bytes are written in: what config.json calls `dtype`."""
    return _main_dtype(made.steps)


def _complaint(missing: Sequence[str], surplus: Sequence[str], reshaped: Sequence[str]) -> str:
    parts = ["The checkpoint's tensors and the native model's do not meet."]
    for title, names in (
        ("missing from the checkpoint", missing),
        ("in the checkpoint, but with no place in the model", surplus),
        ("of another shape", reshaped),
    ):
        if names:
            rest = f"\n      … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"  {len(names)} {title}:\n      " + "\n      ".join(names[:SHOWN]) + rest)
    if surplus:
        parts.append("  A tensor you can do without is left out with --drop PATTERN; nothing is left out silently.")
    return "\n".join(parts)


def tensor_counts(made: Plan) -> dict[str, Any]:
    """How many tensors were read, written and dropped."""
    used = sum(len(step.sources) + len(step.aliases) for step in made.steps)
    return {"read": used, "written": sum(1 for _ in made.targets), "dropped": len(made.dropped)}
