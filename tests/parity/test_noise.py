"""What is allowed: the original's own noise where a reference holds both precisions, the depth formula elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from weightport.checkpoints.types import TensorRef
from weightport.parity import Comparison, Expected, Verdict
from weightport.parity.compare import Place, compare
from weightport.parity.noise import DOUBLE, KINK, MANY, SINGLE, SPREAD, Noise, OwnNoise, gradient_scale_of
from weightport.parity.own_noise import own_noise_of
from weightport.parity.passing import mark_passing
from weightport.parity.reference import Run
from weightport.parity.seams import Observed

NOISE = Noise(growth=48.0, limit=1e-5)
VALUES = torch.linspace(-1, 1, 512, dtype=torch.float64) * math.sqrt(3)
"""With a root mean square of 1."""


def expected(seam: str, value: torch.Tensor, dtype: torch.dtype = torch.float64) -> Expected:
    return Expected(seam, dtype, TensorRef.of(f"run/out/{seam}", tuple(value.shape), value.dtype, lambda: value))


def reference(kind: str = "forward", **seams: tuple[torch.Tensor, torch.Tensor]) -> Run:
    """A run that holds each seam in float32 and in float64."""
    outputs = [
        expected(seam, value, dtype)
        for seam, pair in seams.items()
        for value, dtype in zip(pair, (torch.float32, torch.float64))
    ]
    return Run("run", kind, {}, tuple(outputs))


def judged(error: float, own: OwnNoise | None, dtype=torch.float32, kinked: bool = False) -> Comparison:
    """A value that lies `error` from the float64 reference."""
    value = VALUES.clone()
    value[100] += error
    place = Place("run", dtype, 4, NOISE, 0.0, kinked, own)
    return compare(Observed(value), expected("vision", VALUES), place)


def test_error_of_the_original_s_own_size_is_no_departure_where_the_formula_says_so() -> None:
    assert judged(5e-5, None).verdict is Verdict.DEPARTS
    result = judged(5e-5, OwnNoise(5e-5, 512, 1.7))
    assert result.verdict is Verdict.WITHIN_NOISE and result.verdict.passes
    assert result.formula == pytest.approx(1e-5, rel=0.1) and result.relative_own == pytest.approx(5e-5, rel=0.01)
    assert judged(1.1 * SPREAD * 5e-5, OwnNoise(5e-5, 512, 1.7)).verdict is Verdict.DEPARTS


def test_error_below_the_formula_departs_where_the_original_is_quieter() -> None:
    assert judged(8e-6, None).verdict is Verdict.AGREES
    assert judged(8e-6, OwnNoise(1e-6, 512, 1.7)).verdict is Verdict.DEPARTS
    assert judged(2.5e-6, OwnNoise(1e-6, 512, 1.7)).verdict is Verdict.AGREES


def test_few_elements_keep_the_formula() -> None:
    """One number may be exact by chance."""
    assert judged(8e-6, OwnNoise(0.0, MANY - 1, 1.7)).verdict is Verdict.AGREES
    assert judged(8e-6, OwnNoise(0.0, MANY, 1.7)).verdict is Verdict.DEPARTS


def test_noise_of_float64_is_that_of_float32_in_its_own_eps() -> None:
    own = OwnNoise(1e-4, 512, 1.7)
    allowed = SPREAD * math.sqrt(2) * 1e-4 * DOUBLE / SINGLE
    assert own.allowance(1e-13, torch.float64, torch.float64) == pytest.approx(allowed)
    # A false alarm of the depth formula alone.
    assert judged(0.9 * allowed, None, torch.float64).verdict is Verdict.DEPARTS
    assert judged(0.9 * allowed, own, torch.float64).verdict is Verdict.WITHIN_NOISE
    assert judged(1.1 * allowed, own, torch.float64).verdict is Verdict.DEPARTS


def test_what_is_exact_in_the_original_may_round_in_its_last_bits() -> None:
    assert judged(2 * SINGLE, OwnNoise(0.0, 512, 1.7)).verdict.passes
    assert judged(8 * SINGLE, OwnNoise(0.0, 512, 1.7)).verdict is Verdict.DEPARTS


def test_flipped_rectifiers_of_float32_excuse_nothing_in_float64() -> None:
    flipped = OwnNoise(2e-3, 512, 1.7)
    assert judged(0.9 * KINK, flipped, kinked=True).verdict.passes
    assert judged(1e-12, flipped, torch.float64, kinked=True).verdict is Verdict.DEPARTS
    assert judged(1e-12, OwnNoise(1e-4, 512, 1.7), torch.float64, kinked=True).verdict is Verdict.DEPARTS
    assert judged(4e-13, OwnNoise(1e-4, 512, 1.7), torch.float64).verdict.passes


def test_reference_that_was_not_float32_throughout_excuses_nothing() -> None:
    """TF32 rounds to 2^-11: its own error would let a port in half precision pass."""
    result = judged(1e-3, OwnNoise(1e-3, 512, 1.7))
    assert result.verdict is Verdict.DEPARTS and "TF32" in result.note
    assert judged(1e-3, OwnNoise(1e-3, 512, 1.7), torch.float64).verdict is Verdict.DEPARTS
    assert not judged(5e-5, OwnNoise(5e-5, 512, 1.7)).note


def test_own_noise_is_the_largest_error_of_float32_against_float64() -> None:
    single = VALUES.float()
    single[7] += 3e-6
    run = reference(vision=(single, VALUES), logits=(single[:5], VALUES[:4]))
    own = own_noise_of(run)
    assert set(own) == {"vision"}, "cut otherwise, a seam says nothing"
    assert own["vision"].largest == pytest.approx(3e-6, rel=0.05) and own["vision"].elements == 512
    assert own_noise_of(Run("run", "generate", {}, run.outputs)) == {}


def test_norms_of_gradients_are_measured_together() -> None:
    scales = torch.linspace(0.5, 2.0, MANY, dtype=torch.float64)
    errors = torch.zeros(MANY, dtype=torch.float64)
    errors[3] = 1e-6
    seams = {f"grad_norm.p{i}": ((s * (1 + e)), s) for i, (s, e) in enumerate(zip(scales, errors))}
    own = own_noise_of(reference("train", **seams))
    assert all(
        own[f"grad_norm.p{i}"].largest == pytest.approx(1e-6 * float(s), rel=1e-3) for i, s in enumerate(scales)
    )
    assert not any(each.decides for each in own.values()), "a backward pass may be noisier than the original's"
    alone = own_noise_of(reference("train", **seams), kinked=lambda seam: seam == "grad_norm.p3")
    assert alone["grad_norm.p3"].elements == 1 and alone["grad_norm.p0"].largest == 0


def test_gradient_of_a_table_is_measured_on_the_rows_that_were_used() -> None:
    gradient = torch.zeros(1000, 8)
    gradient[:10] = 2.0
    assert gradient_scale_of(gradient) == 2.0 and gradient_scale_of(torch.zeros(3)) == 0.0


ORDER = ("vision", "encoder", "logits", "loss")


def rows(*wrong: str, note: str = "", dtypes=("float32", "float64"), of=None) -> list[Comparison]:
    return [
        Comparison("run", seam, dtype, "float64", Verdict.DEPARTS if seam in wrong and dtype == (of or dtype) else
                   Verdict.AGREES, (1,), None if note else 1.0, note=note)
        for seam in ORDER
        for dtype in dtypes
    ]  # fmt: skip


def verdicts(found: list[Comparison]) -> set[Verdict]:
    marked = mark_passing(found, ORDER, lambda seam: seam in ("logits", "loss"))
    return {each.verdict for each in marked}


def test_departure_that_no_later_seam_shows_is_told_and_does_not_fail() -> None:
    assert verdicts(rows("vision")) == {Verdict.AGREES, Verdict.PASSING}
    assert Verdict.PASSING.passes


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (rows("vision", "logits"), "the logits show it"),
        (rows("loss"), "a loss is an end itself"),
        (rows("vision", note="2 NaN in the native model's values"), "NaN is no error that is absorbed"),
        (rows("vision", of="float32") + rows("logits", of="float64"), "float64 shows it"),
        ([each for each in rows("encoder") if each.seam == "encoder"], "nothing comes after it"),
    ],
)
def test_departure_with_consequences_departs(found: list[Comparison], says: str) -> None:
    assert Verdict.DEPARTS in verdicts(found) and Verdict.PASSING not in verdicts(found), says
