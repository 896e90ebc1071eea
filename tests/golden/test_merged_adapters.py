"""Adapters trained on an original, merged into the converted directory on files: the original's numbers, or a
refusal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_case import Case
from needs import has_adapter_to_refuse, has_portable_adapter, judges
from rich.console import Console

from weightport.adapters.merging.merge import MergeOptions
from weightport.api import check_parity, merge_lora
from weightport.errors import AdapterError
from weightport.parity import render


@pytest.fixture
def adapter(case: Case, rebuilt: Callable[[Case], Path]) -> Path:
    """The adapter of a case, with the original's module names."""
    return rebuilt(case).parent / case.adapter


@judges(has_portable_adapter)
def test_adapter_with_the_originals_names_is_merged_to_everything_that_the_original_gave(
    case: Case, table, adapter: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    # In float64 nothing is rounded, so the merged model is held to what the adapter beside the base gave.
    options = MergeOptions(untie=True, dtype=torch.float64)
    merged = merge_lora(converted(case), [(adapter, 1.0)], tmp_path / "merged", options).directory
    reference = table.write_case(case, tmp_path / "reference.safetensors")
    report = check_parity(merged, reference, dtypes=[torch.float64])
    console = Console(file=io.StringIO(), width=160)
    render(report, console)
    assert report.passed, f"{case.name}: {console.file.getvalue()}"


@judges(has_adapter_to_refuse)
def test_adapter_that_cannot_be_merged_is_refused_by_name(
    case: Case, adapter: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"\.dw: "):
        merge_lora(converted(case), [(adapter, 1.0)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
