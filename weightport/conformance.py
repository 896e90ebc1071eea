"""The conformance kit of a family: what a case shows of its recognition, coverage, round trip, parity and training.

A case is a folder: the original checkpoint, and `reference.safetensors`, what the original computed on it (the format
of weightport.parity.reference). `case.json`, where there is one, names them:

    {"sources": {"checkpoint": "original.pt"}, "options": {"vocabulary": "none"}, "reference": "reference.safetensors"}

Every check works on the family's own declaration and the engines' public functions; nothing in it knows a family.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.errors import FamilyError, WeightportError
from weightport.families.declaration import Family
from weightport.families.registry import FamilyRegistry

if TYPE_CHECKING:
    from weightport.checkpoints import Checkpoint, TensorRef
    from weightport.parity.report import ParityReport

REFERENCE = "reference.safetensors"
_WITHOUT_EFFECT = re.compile(r"(.+\.)?(k|key|k_proj|key_proj)\.bias")
"""Tensors that change no output: a key's bias adds one number to all scores of a query, which softmax takes away.
Counters (a norm's number of batches) are no floating-point tensors."""
MISTAKES = 12
"""Mistakes that are planted, spread over the rows of the rule table."""


@dataclass(frozen=True)
class Case:
    """One case: its sources by name, the options they are converted with, its reference (None: it has none)."""

    folder: Path
    sources: dict[str, Path]
    options: dict[str, Any]
    reference: Path | None


@dataclass(frozen=True)
class Check:
    """What one check found. `passed` None: it could not be made, and `detail` says why."""

    name: str
    case: str
    passed: bool | None
    detail: str


def find_cases(folder: Path) -> list[Path]:
    """The folders of cases at `folder` or below it: those with a case.json or a reference.safetensors."""
    found = {path.parent for name in ("case.json", REFERENCE) for path in folder.rglob(name)}
    return sorted(found)


def installed_cases(family: Family) -> list[Path]:
    """The cases that are installed with a family; none where it declares none."""
    if family.cases is None:
        return []
    package, _, folder = family.cases.partition(":")
    found = find_cases(Path(str(files(package))) / folder)
    if not found:
        raise FamilyError(f"The family {family.name!r} declares cases in {family.cases}, where there are none.")
    return found


def family_of_case(folder: Path) -> str:
    """The family that a case says it is of, in case.json or else in its reference. Raises FamilyError where neither
    says it."""
    from weightport.parity.reference import read_reference

    stated = _stated(folder).get("family")
    if stated is not None:
        return str(stated)
    reference = folder / str(_stated(folder).get("reference", REFERENCE))
    if not reference.is_file():
        raise FamilyError(f'{folder} does not say of which family it is: {{"family": "NAME"}} in case.json.')
    return read_reference(reference).family


def read_case(folder: Path) -> Case:
    """The case in `folder`. Raises FamilyError for one that cannot be told."""
    path, stated = folder / "case.json", _stated(folder)
    reference = folder / str(stated.get("reference", REFERENCE))
    sources = stated.get("sources")
    if sources is None:
        rest = [each for each in sorted(folder.iterdir()) if each not in (path, reference) and each.suffix != ".md"]
        if len(rest) != 1:
            raise FamilyError(
                f"{folder} holds {len(rest)} files that may be the original checkpoint. Name it in case.json: "
                '{"sources": {"checkpoint": "FILE"}}.'
            )
        sources = {"checkpoint": rest[0].name}
    found = {str(name): folder / str(file) for name, file in sources.items()}
    for name, file in found.items():
        if not file.exists():
            raise FamilyError(f"{folder}: its source {name!r} should be {file.name}, which is not there.")
    return Case(folder, found, dict(stated.get("options", {})), reference if reference.is_file() else None)


def _stated(folder: Path) -> dict[str, Any]:
    """What case.json says; nothing where there is none."""
    path = folder / "case.json"
    if not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FamilyError(f"{path} is not JSON: {error}.") from error
    if not isinstance(stated, dict):
        raise FamilyError(f"{path} should hold a JSON object; found {type(stated).__name__}.")
    return stated


def check_family(
    family: Family, families: FamilyRegistry, cases: list[Case], advance: Callable[[Check], None] = lambda check: None
) -> list[Check]:
    """Run the kit. `families` are all that are known: no other may claim a case. `advance` is told of each check."""
    found: list[Check] = []
    for check in _checks(family, families, cases):
        found.append(check)
        advance(check)
    return found


def _checks(family: Family, families: FamilyRegistry, cases: list[Case]) -> Iterator[Check]:
    yield _light_declaration(family)
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="weightport-family-") as scratch:
            yield from _case_checks(family, families, case, Path(scratch))


def _case_checks(family: Family, families: FamilyRegistry, case: Case, scratch: Path) -> Iterator[Check]:
    name, native = case.folder.name, scratch / "native"
    yield _guarded("recognition", name, lambda: _recognition(family, families, case))
    converted = _guarded("coverage", name, lambda: _coverage(family, case, native))
    yield converted
    if not converted.passed:
        return
    yield _guarded("round trip", name, lambda: _round_trip(case, native, scratch / "back"))
    if case.reference is None or family.parity_stage is None:
        missing = "the family has no parity stage" if case.reference else "the case has no reference"
        yield Check("parity", name, None, missing)
        return
    yield _guarded("parity", name, lambda: _parity(case, native))
    yield _guarded("planted mistakes", name, lambda: _planted_mistakes(case, native))
    yield _guarded("training step", name, lambda: _training_step(family, case, native))


def _guarded(what: str, case: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
    try:
        passed, detail = check()
    except WeightportError as error:
        return Check(what, case, False, str(error))
    return Check(what, case, passed, detail)


def _light_declaration(family: Family) -> Check:
    """Importing the declaration must import neither torch nor transformers: command lines are made of it."""
    module = type(family.options()).__module__.rpartition(".")[0]
    code = f"import sys, {module}; print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if finished.returncode:
        return Check("declaration", "", False, finished.stderr.strip().splitlines()[-1])
    heavy = finished.stdout.strip()
    return Check(
        "declaration", "", not heavy, f"importing {module} imports {heavy or 'neither torch nor transformers'}"
    )


def _recognition(family: Family, families: FamilyRegistry, case: Case) -> tuple[bool, str]:
    from weightport.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(case.sources["checkpoint"])
    claiming = [each.name for each in families if each.recognises(checkpoint)]
    if not (family.recognises(checkpoint) and family.conversion.recognises(checkpoint)):
        return False, f"{family.name} does not recognise {checkpoint.path.name}"
    others = [name for name in claiming if name != family.name]
    if others:
        return False, f"{', '.join(others)} recognises it too"
    kind = family.looks_like(checkpoint)
    return kind is not None, f"recognised by no other family; looks like {kind or 'none of its own signatures'}"


def _coverage(family: Family, case: Case, native: Path) -> tuple[bool, str]:
    from weightport.api import convert

    sources: Any = case.sources if len(case.sources) > 1 else case.sources["checkpoint"]
    made = convert(sources, native, family.name, **case.options).plan
    unexplained = [item.ref.name for item in made.dropped if not item.because]
    if unexplained:
        return False, f"dropped without a reason: {', '.join(unexplained[:4])}"
    steps = len(made.steps)
    return True, f"every tensor used or dropped with a reason, every native one made: {steps} steps"


def _round_trip(case: Case, native: Path, back: Path) -> tuple[bool, str]:
    from weightport.api import export
    from weightport.checkpoints import open_checkpoint
    from weightport.checkpoints.lazy_tensors import same_bits
    from weightport.converters.record import read_record

    result = export(native, back)
    record = read_record(native) or {}
    section = record["sources"]["checkpoint"]["section"]
    original, returned = open_checkpoint(case.sources["checkpoint"]), open_checkpoint(back)
    wanted = record["sources"]["checkpoint"]["tensors"]
    dropped = {item["name"] for item in record["dropped"]}
    wrong = []
    for name in wanted:
        before, after = _found(original, name, section), _found(returned, name, section)
        if name in result.lost or (after is None and name in dropped):
            continue
        if after is None:
            wrong.append(f"{name} does not come back")
        elif before is not None and not same_bits(before.read(), after.read()):
            wrong.append(f"{name} comes back with other values")
    if wrong:
        return False, "; ".join(wrong[:4])
    lost = f"; not exactly: {', '.join(list(result.lost)[:4])}" if result.lost else ""
    return True, f"{result.tensors} tensors come back bit for bit{lost}"


def _found(checkpoint: Checkpoint, name: str, section: str) -> TensorRef | None:
    """The tensor that the rules call `name`, at the top of a file or below a section."""
    places = (f"{section}.{name}", f"{section}/{name}", f"model.{name}", name)
    return next((checkpoint[place] for place in places if place in checkpoint), None)


def _judged(case: Case, native: Path, dtype: str) -> ParityReport:
    import torch

    from weightport.api import check_parity

    assert case.reference is not None
    return check_parity(native, case.reference, dtypes=[getattr(torch, dtype)])


def _parity(case: Case, native: Path) -> tuple[bool, str]:
    from weightport.api import check_parity

    assert case.reference is not None
    report = check_parity(native, case.reference)
    return report.passed, report.verdict


def _planted_mistakes(case: Case, native: Path) -> tuple[bool, str]:
    """Change the values of one tensor of a rule's row at a time: the reference must notice each."""
    from weightport.checkpoints import open_checkpoint
    from weightport.converters.record import read_record

    record = read_record(native) or {}
    stored = open_checkpoint(native)
    made = [step["to"][0] for step in record["steps"] if step["from"]]
    rows = [name for name in made if stored[name].dtype.is_floating_point and not _WITHOUT_EFFECT.fullmatch(name)]
    chosen = rows[:: max(1, len(rows) // MISTAKES)][:MISTAKES]
    unnoticed = []
    for name in chosen:
        with _changed(native, name):
            if _judged(case, native, "float32").passed:
                unnoticed.append(name)
    if unnoticed:
        return False, f"a change of 10 % is not noticed in {', '.join(unnoticed[:4])}: the reference does not cover it"
    return True, f"{len(chosen)} of {len(chosen)} mistakes noticed"


@contextmanager
def _changed(native: Path, name: str) -> Iterator[None]:
    """The tensor `name` of the directory 10 % larger and its rows reversed while the block runs."""
    from safetensors.torch import load_file, save_file

    file = next(path for path in sorted(native.glob("*.safetensors")) if name in load_file(path))
    kept = file.read_bytes()
    tensors = load_file(file)
    tensor = tensors[name]
    tensors[name] = (tensor.flip(0) * 1.1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    try:
        yield
    finally:
        file.write_bytes(kept)


def _training_step(family: Family, case: Case, native: Path) -> tuple[bool | None, str]:
    """One step of gradient descent on a training run of the reference: the loss must fall."""
    import torch

    from weightport.api import load_native
    from weightport.parity.reference import read_reference
    from weightport.parity.runner import native_arguments

    assert case.reference is not None
    run = next((run for run in read_reference(case.reference).runs if run.kind == "train"), None)
    if run is None:
        return None, "the reference has no training run"
    model = load_native(native, torch.float32, overrides=family.parity.plain)
    arguments = native_arguments(family.parity, run, model)
    before = model(**arguments, use_cache=False).loss
    before.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad / norm)
        after = model(**arguments, use_cache=False).loss
    return bool(after < before), f"the loss goes from {float(before.detach()):.6f} to {float(after):.6f}"
