"""plan(): every target tensor as an operation on named sources, and every source tensor accounted for.

A plan is complete or it is not made: what is missing, left over, claimed twice or of the wrong shape is listed in one
error. It costs no reading: operations on lazy tensors say shapes and dtypes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from weightport.checkpoints.lazy_tensors import Lazy, blocks, chunks, same_stored_bits
from weightport.checkpoints.types import NamedTensors, TensorRef
from weightport.converters.native import NativeTensors
from weightport.converters.patterns import Capture
from weightport.converters.rules import Claim, Derived, Filled, Rule, RuleTable
from weightport.errors import CoverageError
from weightport.writing.outgoing import Outgoing

SHOWN = 12
"""How many names an error lists before it counts the rest."""


@dataclass(frozen=True)
class Step:
    """One application of a rule. `aliases` are equal copies of the first source, to be compared, not written."""

    rule: Rule | Filled
    sources: tuple[TensorRef, ...]
    aliases: tuple[TensorRef, ...]
    targets: tuple[Outgoing, ...]

    @property
    def operation(self) -> str:
        """What is done, in words."""
        if isinstance(self.rule, Filled):
            return "compute" if self.rule.compute is not None else f"fill {self.rule.value:g}"
        return self.rule.operation.name


@dataclass(frozen=True)
class DroppedTensor:
    """A source tensor that is not part of the model. `derived` ones are compared with what the configuration gives
    first; `kept` ones are written beside the model."""

    ref: TensorRef
    because: str
    derived: Derived | None = None
    kept: bool = False


@dataclass(frozen=True)
class Plan:
    """What conversion will do, before it does it."""

    steps: tuple[Step, ...]
    dropped: tuple[DroppedTensor, ...]
    buffers: frozenset[str] = frozenset()

    @property
    def targets(self) -> Iterator[Outgoing]:
        return (target for step in self.steps for target in step.targets)

    @property
    def kept(self) -> tuple[TensorRef, ...]:
        """Source tensors that are written beside the model."""
        return tuple(item.ref for item in self.dropped if item.kept)

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets) + sum(ref.nbytes for ref in self.kept)

    @property
    def parameters(self) -> int:
        """Elements of the model's parameters; tied ones count once, buffers (batch statistics) do not."""
        return sum(prod(target.shape) for target in self.targets if target.name not in self.buffers)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that most of the bytes are written in: what config.json calls `dtype`."""
        return _main_dtype(self.targets)


@dataclass
class _Problems:
    """What keeps a plan from being made, name by name. `explained`: targets that are missing for a reason that is
    among these already."""

    missing: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)

    def raise_any(self) -> None:
        """Raise CoverageError when there is one."""
        parts = []
        for title, names in (
            ("missing from the checkpoint", self.missing),
            ("left out on request, but the model cannot do without", self.needed),
            ("in the checkpoint, but with no place in the model", self.surplus),
            ("of another shape", self.reshaped),
        ):
            if names:
                rest = f"\n      … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                parts.append(f"  {len(names)} {title}:\n      " + "\n      ".join(names[:SHOWN]) + rest)
        if self.surplus:
            parts.append(
                "  A tensor you can do without is left out with --drop PATTERN; nothing is left out silently."
            )
        if parts:
            raise CoverageError("\n".join(["The checkpoint's tensors and the native model's do not meet.", *parts]))


def plan(
    sources: NamedTensors,
    rules: RuleTable,
    native: NativeTensors,
    dtype: torch.dtype | None = None,
    drop: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve `rules` against a checkpoint's tensors and a model's own parameter list.

    `native` is every tensor the model loads. `dtype` is what floating-point tensors are written in; by default each
    keeps its own. `drop` names source tensors the user gave up, and why.

    Raises CoverageError, naming every tensor, unless each source is used or dropped and each target is produced once
    with its exact shape.
    """
    drop = drop or {}
    problems = _Problems()
    groups, dropped = _claimed(sources, rules, drop, problems)
    steps: list[Step] = []
    produced: set[str] = set()
    for claims in groups.values():
        step = _apply(claims, native.shapes, dtype, drop, problems)
        if step is None:
            continue
        for target in step.targets:
            if target.name in produced:
                raise CoverageError(f"The rule table produces {target.name} twice.")
            produced.add(target.name)
            if target.name not in native.shapes:
                problems.surplus += [
                    f"{ref.name} {list(ref.shape)} (would become {target.name}, which the model does not have)"
                    for ref in step.sources
                ]
        steps.append(step)
    float_dtype = dtype or _main_dtype(target for step in steps for target in step.targets)
    for name, shape in native.shapes.items():
        if name in produced or name in problems.explained:
            continue
        filling = rules.filling_of(name)
        if filling is not None:
            steps.append(Step(filling, (), (), (_filled(filling, name, shape, float_dtype),)))
        else:
            _explain_missing(name, shape, sources, rules, drop, problems)
    problems.raise_any()
    return Plan(tuple(steps), tuple(dropped), native.buffers)


Claims = list[tuple[Claim, TensorRef]]


def _claimed(
    sources: NamedTensors, rules: RuleTable, drop: Mapping[str, str], problems: _Problems
) -> tuple[dict[tuple[int, tuple[Capture, ...]], Claims], list[DroppedTensor]]:
    """(the sources of each application of a rule, what is dropped)."""
    groups: dict[tuple[int, tuple[Capture, ...]], Claims] = {}
    dropped: list[DroppedTensor] = []
    for name, ref in sources.items():
        if name in drop:
            dropped.append(DroppedTensor(ref, drop[name]))
            continue
        claims = list(rules.of_source(name))
        if len(claims) > 1:
            claimants = " and ".join(str(claim.rule.sources[0]) for claim in claims)
            raise CoverageError(f"The rule table claims {name} twice: by {claimants}.")
        if claims:
            groups.setdefault(claims[0].group, []).append((claims[0], ref))
        elif (derived := rules.derivation_of(name)) is not None:
            dropped.append(DroppedTensor(ref, derived.because, derived))
        elif (row := rules.drop_of(name)) is not None:
            dropped.append(DroppedTensor(ref, row.because, kept=row.kept))
        else:
            problems.surplus.append(f"{name} {list(ref.shape)}")
    return groups, dropped


def _apply(
    claims: Claims,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    drop: Mapping[str, str],
    problems: _Problems,
) -> Step | None:
    """The step of one group of claims; None, and a problem, where a source is absent or a shape does not fit."""
    rule, captures = claims[0][0].rule, claims[0][0].captures
    count = len(rule.sources)
    layers = 1 + max(claim.layer for claim, _ in claims)
    present = {ref.name: ref for claim, ref in claims if claim.pattern < count}
    # No more names are made than the file could hold: a number in one name does not decide how many there are.
    if layers > len(claims):
        problems.missing.append(
            f"{layers - len(claims)} or more layers of {rule.sources[0]} below {claims[-1][1].name}"
        )
        return None
    wanted = rule.source_names(captures, layers)
    absent = [name for name in wanted if name not in present]
    if absent:
        problems.needed += [f"{name} ({drop[name]})" for name in absent if name in drop]
        problems.missing += [name for name in absent if name not in drop]
        return None
    sources = tuple(present[name] for name in wanted)
    aliases = tuple(ref for claim, ref in sorted(claims, key=lambda each: each[0].place) if claim.pattern >= count)
    problems.reshaped += [
        f"{alias.name} is {list(alias.shape)}, but its tied copy {sources[0].name} {list(sources[0].shape)}"
        for alias in aliases
        if alias.shape != sources[0].shape
    ]
    found = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in sources[:SHOWN])
    try:
        outputs = rule.operation.forward(sources)
    except (ValueError, RuntimeError, IndexError) as error:
        problems.reshaped.append(f"{found}: {rule.operation.name} does not apply ({error})")
        problems.explained.update(rule.target_names(captures, 1))
        return None
    names = rule.target_names(captures, max(1, len(outputs) // len(rule.targets)))
    targets = []
    for name, made in zip(names, outputs, strict=True):
        want = shapes.get(name)
        if want is not None and tuple(made.shape) != tuple(want):
            problems.reshaped.append(
                f"{found} → {name}: the model has {list(want)}, the file gives {list(made.shape)}"
            )
        targets.append(_outgoing(name, made, dtype, sources, aliases))
    return Step(rule, sources, aliases, tuple(targets))


def _outgoing(
    name: str, made: Lazy, dtype: torch.dtype | None, sources: Sequence[TensorRef], aliases: Sequence[TensorRef]
) -> Outgoing:
    """The target `name` with the values of `made`, in `dtype` where it is floating-point."""
    written = dtype if dtype and made.dtype.is_floating_point else made.dtype

    def values() -> Iterator[torch.Tensor]:
        check_ties(sources[0], aliases)
        return blocks(made, written)

    return Outgoing(name, tuple(made.shape), written, values, ", ".join(ref.name for ref in sources))


def _filled(filling: Filled, name: str, shape: tuple[int, ...], float_dtype: torch.dtype) -> Outgoing:
    dtype = filling.dtype or float_dtype

    def values() -> Iterator[torch.Tensor]:
        made = filling.compute(shape) if filling.compute else torch.full(shape, filling.value, dtype=dtype)
        return chunks(made, dtype)

    return Outgoing(name, tuple(shape), dtype, values)


def _explain_missing(
    name: str,
    shape: tuple[int, ...],
    sources: NamedTensors,
    rules: RuleTable,
    drop: Mapping[str, str],
    problems: _Problems,
) -> None:
    """Say what a target that nothing produces would have come from."""
    claim = next(rules.of_target(name), None)
    wanted = claim.rule.source_names(claim.captures, 1) if claim else []
    if lacking := [f"{source} ({drop[source]})" for source in wanted if source in drop]:
        problems.needed += [line for line in lacking if line not in problems.needed]
        return
    absent = [source for source in wanted if source not in sources]
    if not set(absent) & set(problems.missing):
        problems.missing.append(f"{', '.join(absent) or 'nothing in the file'} {list(shape)} → {name}")


def check_ties(first: TensorRef, aliases: Sequence[TensorRef]) -> None:
    """Tied copies must be equal bit for bit: only then does writing one of them lose nothing. Raises CoverageError."""
    for alias in aliases:
        if alias.storage and alias.storage == first.storage:
            continue
        if not same_stored_bits(first, alias):
            raise CoverageError(
                f"{alias.name} and {first.name} are one matrix in the model, but the checkpoint holds different "
                "values for them. Converting would lose one of the two."
            )


def _main_dtype(targets: Iterator[Outgoing]) -> torch.dtype:
    """The floating-point dtype that most bytes are written in."""
    sizes: dict[torch.dtype, int] = {}
    for target in targets:
        if target.dtype.is_floating_point:
            sizes[target.dtype] = sizes.get(target.dtype, 0) + target.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def tensor_counts(made: Plan) -> dict[str, int]:
    """How many tensors were read, written and dropped, and what the others became, so that the numbers add up:
    written = read - tied - merged + split + filled."""
    moved = [(len(step.sources), len(step.targets)) for step in made.steps]
    return {
        "read": sum(len(step.sources) + len(step.aliases) for step in made.steps),
        "written": sum(targets for _, targets in moved),
        "dropped": len(made.dropped),
        "tied": sum(len(step.aliases) for step in made.steps),
        "merged": sum(max(sources - targets, 0) for sources, targets in moved),
        "split": sum(max(targets - sources, 0) for sources, targets in moved if sources),
        "filled": sum(targets for sources, targets in moved if not sources),
    }
