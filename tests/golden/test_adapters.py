"""Adapters trained on an original, ported: applied and merged they give the original's numbers, or they are
refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_case import Case
from needs import has_adapter_to_refuse, has_adapter_training, has_portable_adapter, judges
from rich.console import Console

from weightport.adapters import untie_head
from weightport.api import check_parity, load_native, port_adapter
from weightport.errors import AdapterError
from weightport.families.florence2.parity import NOISE
from weightport.parity import render
from weightport.parity.noise import scale_of

peft = pytest.importorskip("peft")

DTYPES = {torch.float32: "", torch.float64: ".f64"}


@pytest.fixture
def original(case: Case, rebuilt: Callable[[Case], Path]) -> Path:
    """The folder of an adapter case's base."""
    return rebuilt(case).parent


@pytest.fixture
def ported(case: Case, original: Path, converted: Callable[..., Path], tmp_path: Path) -> Path:
    return port_adapter(original / case.adapter, tmp_path / "adapter", converted(case)).directory


def applied(directory: Path, adapter: Path, dtype: torch.dtype, *, untied: bool = False) -> torch.nn.Module:
    model = load_native(directory, dtype)
    return peft.PeftModel.from_pretrained(untie_head(model) if untied else model, adapter).to(dtype).eval()


def assert_close(case: Case, what: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    reference = case.tensors[what + DTYPES[dtype]]
    error = float((value.double() - reference.double()).abs().max())
    # The native model is as deep as any that the noise was calibrated on.
    allowed = NOISE.allowance(100, dtype, reference.dtype) * scale_of(reference)
    assert error <= allowed, f"{case.name}: {what} is off by {error:.1e}, allowed {allowed:.1e}"


@judges(has_adapter_training)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ported_adapter_gives_the_originals_logits(
    case: Case, table, converted: Callable[..., Path], ported: Path, dtype: torch.dtype
) -> None:
    model = applied(converted(case), ported, dtype)
    arguments = table.native_arguments(case, model.config, dtype)
    with torch.no_grad():
        assert_close(case, "logits", model(**arguments, use_cache=False).logits, dtype)


@judges(has_adapter_training)
def test_ported_adapter_has_the_originals_loss_and_gradients(
    case: Case, table, converted: Callable[..., Path], ported: Path
) -> None:
    model = applied(converted(case), ported, torch.float64)
    model.requires_grad_(True)
    arguments = table.native_arguments(case, model.config, torch.float64)
    del arguments["decoder_input_ids"]
    figures = {name.removesuffix(".f64"): figure for name, figure in case.spec["training"].items() if ".f64" in name}
    model.get_base_model().loss_function = table.exact_loss
    for run in ("pad_as_label", "pad_masked"):
        labels = case.tensors["in.labels"]
        model.zero_grad()
        loss = model(**arguments, labels=labels.masked_fill(labels == 1, -100) if run == "pad_masked" else labels).loss
        assert loss.item() == pytest.approx(figures[f"loss.{run}"], rel=1e-12)
        loss.backward()
        norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
        whole = max(figures[f"grad_norm.{run}"].values())
        for name, norm in figures[f"grad_norm.{run}"].items():
            assert norms[table.native_parameter(name, model.config)] == pytest.approx(
                norm, rel=1e-9, abs=1e-12 * whole
            )


@judges(has_portable_adapter)
def test_merged_adapter_gives_everything_that_the_original_gave(
    case: Case, table, converted: Callable[..., Path], ported: Path, tmp_path: Path
) -> None:
    merged = applied(converted(case), ported, torch.float64, untied=True).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    # In float64, where a wrong merge cannot hide in rounding.
    reference = table.write_case(case, tmp_path / "reference.safetensors")
    report = check_parity(tmp_path / "merged", reference, dtypes=[torch.float64])
    console = Console(file=io.StringIO(), width=160)
    render(report, console)
    assert report.passed, f"{case.name}: {console.file.getvalue()}"


@judges(has_portable_adapter)
def test_adapter_is_ported_the_same_from_the_original_base(
    case: Case, original: Path, ported: Path, tmp_path: Path
) -> None:
    other = port_adapter(original / case.adapter, tmp_path / "other", original).directory
    assert (other / "adapter_model.safetensors").read_bytes() == (ported / "adapter_model.safetensors").read_bytes()


@judges(has_adapter_to_refuse)
def test_adapter_that_cannot_be_carried_is_refused_by_name(
    case: Case, original: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"\.dw: "):
        port_adapter(original / case.adapter, tmp_path / "adapter", converted(case))
    assert not (tmp_path / "adapter").exists()
