"""Every golden case of the folder, judged by the same code: `pytest tests/golden [--golden DIR] [--slow]`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_case import Case, sources_of
from needs import FAMILIES, generates, has_averaged_weights, has_checkpoint, is_of_the_model_alone, judges
from rich.console import Console

from weightport.api import check_parity, export
from weightport.checkpoints import open_checkpoint
from weightport.parity import ParityReport, render
from weightport.parity.reference import read_reference


def explained(report: ParityReport) -> str:
    """The report as a terminal shows it."""
    console = Console(file=io.StringIO(), width=160)
    render(report, console)
    return console.file.getvalue()


@pytest.fixture
def reference(case: Case, table, tmp_path: Path) -> Path:
    """The case's reference in the product's format."""
    return table.write_case(case, tmp_path / "reference.safetensors")


def test_case_is_of_a_family_that_can_be_judged(case: Case) -> None:
    assert case.family in FAMILIES, f"{case.name}: no table brings a reference of {case.family!r} into our format"


@judges(is_of_the_model_alone)
def test_native_model_computes_what_the_original_computed(
    case: Case, reference: Path, converted: Callable[..., Path]
) -> None:
    report = check_parity(converted(case), reference)
    print(explained(report))
    assert report.passed, f"{case.name}: {explained(report)}"
    assert not report.not_compared, f"{case.name}: not compared: {report.not_compared}"
    assert {each.run for each in report.comparisons} == {run.name for run in read_reference(reference).runs}


@judges(has_averaged_weights)
def test_averaged_weights_compute_what_the_original_evaluates_with(
    case: Case, table, tmp_path: Path, converted: Callable[..., Path]
) -> None:
    averaged = table.write_case(case, tmp_path / "ema.safetensors", ema=True)
    report = check_parity(converted(case, ema=True), averaged)
    assert report.passed, f"{case.name} (EMA): {explained(report)}"
    assert not check_parity(converted(case), averaged, dtypes=[torch.float32]).passed, (
        f"{case.name}: the weights that are not averaged pass for the averaged ones"
    )


@judges(generates)
def test_generation_without_cache_gives_the_same_ids(
    case: Case, table, tmp_path: Path, converted: Callable[..., Path]
) -> None:
    only = table.write_case(case, tmp_path / "generation.safetensors", kinds=("generate",))
    report = check_parity(converted(case), only, dtypes=[torch.float32], use_cache=False)
    assert report.comparisons
    assert report.passed, f"{case.name}: {explained(report)}"


@judges(has_checkpoint)
def test_export_returns_the_original_tensors_bit_for_bit(
    case: Case, table, tmp_path: Path, rebuilt: Callable[[Case], Path], converted: Callable[..., Path]
) -> None:
    exported = open_checkpoint(export(converted(case), tmp_path / "exported.pt").path)
    original = open_checkpoint(sources_of(case, table, rebuilt(case))["checkpoint"])
    for section, want in table.model_parts(original).items():
        got = table.model_parts(exported)[section]
        assert list(got) == list(want), f"{case.name}: other tensors, or another order, in {section}"
        for name, ref in want.items():
            a, b = ref.read(), got[name].read()
            assert a.dtype == b.dtype and a.shape == b.shape, f"{case.name}: {name} is {b.dtype} {list(b.shape)}"
            same = torch.equal(
                a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
            )
            assert same, f"{case.name}: {name} has other bits"
