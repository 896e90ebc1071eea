"""What a report says: figures beside thresholds, what was left out, ties, and the verdict; as text and as JSON."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from weightport.api import check_parity
from weightport.checkpoints.types import TensorRef
from weightport.families.ofa.parity import OFA
from weightport.parity import Expected, Selection, Verdict, render
from weightport.parity.compare import Place, compare, compare_generation
from weightport.parity.noise import KINK, Noise
from weightport.parity.report import worst_of
from weightport.parity.seams import Observed, observe

NOISE = Noise(growth=48.0, limit=1e-5)
PLACE = Place("run", torch.float32, 4, NOISE)


def expected(seam: str, tensor: torch.Tensor, dtype: torch.dtype = torch.float32, selection=Selection()) -> Expected:  # noqa: B008
    return Expected(
        seam, dtype, TensorRef.of(f"run/out/{seam}", tuple(tensor.shape), tensor.dtype, lambda: tensor), selection
    )


def printed(report, **settings) -> str:
    console = Console(file=io.StringIO(), width=200, **settings)
    render(report, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report(native, whole_reference, tmp_path_factory):
    return check_parity(native, whole_reference, dtypes=[torch.float32])


def test_table_prints_every_seam_beside_its_threshold(report) -> None:
    lines = printed(report).splitlines()
    logits = next(line for line in lines if line.startswith("logits"))
    comparison = worst_of([each for each in report.comparisons if (each.seam, each.against) == ("logits", "float32")])
    assert f"{comparison.relative_own:.1e}" in logits and f"{comparison.relative_allowed:.1e}" in logits
    for seam in ("vision", "projector", "encoder.layers.0", "encoder", "decoder.layers.0", "loss", "sequences"):
        assert any(line.startswith(seam) for line in lines), seam
    assert sum(line.startswith("grad_norm.*") for line in lines) <= 2, "one line for all parameters"


def test_seams_are_in_forward_order(report) -> None:
    names = [line.split()[0] for line in printed(report).splitlines()[2:]]
    order = ["vision", "projector", "encoder.embeddings", "encoder.layers.0", "encoder.layers.1", "encoder",
             "decoder.embeddings", "decoder.layers.0", "logits", "loss", "sequences"]  # fmt: skip
    assert [name for name in dict.fromkeys(names) if name in order] == order


def test_output_is_plain_where_there_is_no_terminal(report) -> None:
    assert "\x1b" not in printed(report)
    assert "\x1b" in printed(report, force_terminal=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_narrow_consoles_get_fewer_columns_and_whole_figures(report, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    render(report, console)
    text = console.file.getvalue()
    assert "…" not in text and "agrees" in text
    assert "mean" not in text
    assert max(map(len, text.splitlines()[1:-1])) <= 80


def test_names_of_seams_are_folded_where_figures_leave_no_space(report) -> None:
    console = Console(file=io.StringIO(), width=76, color_system=None)
    render(report, console)
    table = [line for line in console.file.getvalue().splitlines() if " f32/f" in line]
    assert table and max(map(len, table)) <= 76 and all("e-" in line or "0" in line for line in table)


def test_json_holds_what_the_table_is_made_of(report) -> None:
    data = json.loads(report.to_json())
    assert data["passed"] is report.passed and data["verdict"] == report.verdict
    assert len(data["comparisons"]) == len(report.comparisons)
    row = next(each for each in data["comparisons"] if each["seam"] == "logits")
    assert row["largest"] <= row["allowed"] and row["agreement"] == 1.0
    assert all(
        each["relative_allowed"] <= OFA.noise.limit * (1 + 1e-9)
        for each in data["comparisons"]
        if each["against"] == "float64" and each["allowed"] and not each["seam"].startswith("grad")
    )
    assert data["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__


def test_seam_that_the_model_does_not_have_is_left_out_and_named(native, reference) -> None:
    def change(runs, tensors, slices) -> None:
        tensors["text/out/qformer"] = torch.zeros(1)
        tensors["text/out/encoder.layers.99"] = torch.zeros(1)

    report = check_parity(native, reference("text", change=change), dtypes=[torch.float32])
    assert report.passed
    assert {each.seam for each in report.not_compared} == {"qformer", "encoder.layers.99"}
    assert "not compared" in printed(report) and "qformer" in printed(report)


def test_end_of_the_chain_decides_and_a_departure_on_the_way_is_told(native, reference) -> None:
    def on_the_way(runs, tensors, slices) -> None:
        tensors["image_text/out/vision"] = tensors["image_text/out/vision"] * 1.001

    def at_the_end(runs, tensors, slices) -> None:
        on_the_way(runs, tensors, slices)
        tensors["image_text/out/logits"] = tensors["image_text/out/logits"] * 1.001

    told = check_parity(native, reference("image_text", change=on_the_way), dtypes=[torch.float32])
    assert told.passed and {each.seam for each in told.passing} == {"vision"}
    assert told.verdict.startswith("same model") and "vision departs on the way, and no later seam" in told.verdict
    assert "departs here only" in printed(told)
    wrong = check_parity(native, reference("image_text", change=at_the_end), dtypes=[torch.float32])
    assert not wrong.passed and wrong.first_departure.seam == "vision" and not wrong.passing


def test_other_shape_departs_and_both_shapes_are_named(native, reference) -> None:
    def change(runs, tensors, slices) -> None:
        tensors["text/out/logits"] = tensors["text/out/logits"][:, :-1].clone()

    report = check_parity(native, reference("text", change=change), dtypes=[torch.float32])
    assert not report.passed
    assert "shape" in report.first_departure.note


def test_runs_in_float64_are_held_to_float64_noise(native, reference) -> None:
    report = check_parity(native, reference("text"))
    exact = [each for each in report.comparisons if (each.dtype, each.against) == ("float64", "float64")]
    assert exact and all(each.relative_allowed < 1e-12 for each in exact)
    against = {each.against for each in report.comparisons if each.dtype == "float32" and each.seam == "logits"}
    assert against == {"float32", "float64"}


def test_allowance_grows_with_depth_and_never_beyond_the_limit() -> None:
    depths = [NOISE.allowance(depth, torch.float64) for depth in range(100)]
    assert depths == sorted(depths) and depths[8] == pytest.approx(3 * depths[0])
    assert NOISE.allowance(10_000, torch.float32) == NOISE.limit
    assert NOISE.allowance(3, torch.float64, torch.float32) == NOISE.allowance(3, torch.float32)
    assert NOISE.allowance(3, torch.float32, kinked=True) == KINK > NOISE.allowance(3, torch.float64, kinked=True)


def test_largest_error_is_measured_against_the_scale_of_the_reference() -> None:
    reference = torch.tensor([3.0, -4.0]) * 1000
    result = compare(Observed(reference + torch.tensor([0.0, 0.01])), expected("encoder", reference), PLACE)
    assert result.scale == pytest.approx(1000 * math.sqrt(12.5))
    assert result.largest == pytest.approx(0.01, rel=0.1) and result.verdict is Verdict.AGREES
    assert compare(Observed(reference * 1.001), expected("encoder", reference), PLACE).verdict is Verdict.DEPARTS


def test_nan_in_either_departs_and_infinity_equals_itself() -> None:
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan])
    for value, reference in ((bad, good), (good, bad), (bad, bad)):
        result = compare(Observed(value), expected("encoder", reference), PLACE)
        assert result.verdict is Verdict.DEPARTS and "NaN" in result.note
    infinite = torch.tensor([1.0, -torch.inf])
    assert compare(Observed(infinite), expected("scores", infinite), PLACE).verdict is Verdict.AGREES
    apart = compare(Observed(good), expected("scores", infinite), PLACE)
    assert apart.verdict is Verdict.DEPARTS and "infinite" in apart.note and apart.largest is None


def test_derived_seams_are_cut_like_the_logits() -> None:
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    positions = [0, 5]
    selection = Selection((slice(0, None, 1), tuple(positions)))
    sums = observe(logits, expected("logits.lse", torch.zeros(2, 2), selection=selection)).value
    assert torch.equal(sums, logits.logsumexp(-1)[:, positions])
    choices = observe(logits, expected("logits.argmax", logits.argmax(-1)[:, positions], selection=selection))
    assert torch.equal(choices.value, logits.argmax(-1)[:, positions])
    assert choices.shortfall.abs().max() == 0


@pytest.mark.parametrize(("gap", "verdict"), [(1e-7, Verdict.TIED), (1e-2, Verdict.DEPARTS)])
def test_other_argmax_is_a_tie_only_within_noise(gap: float, verdict: Verdict) -> None:
    logits = torch.tensor([[[1.0 + gap, 1.0, 0.0]]])
    each = expected("logits.argmax", torch.tensor([[1]]))
    assert compare(observe(logits, each), each, PLACE).verdict is verdict


def hypotheses(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([list(rows)])


@pytest.mark.parametrize(("score", "verdict"), [(-1.0 - 1e-7, Verdict.TIED), (-1.1, Verdict.DEPARTS)])
def test_beams_in_another_order_are_a_tie_only_with_equal_scores(score: float, verdict: Verdict) -> None:
    own = {"sequences": Observed(hypotheses([5, 2], [6, 2])), "scores": Observed(torch.tensor([[-1.0, score]]))}
    theirs = {
        "sequences": expected("sequences", hypotheses([6, 2], [5, 2])),
        "scores": expected("scores", torch.tensor([[-1.0, -1.0]])),
    }
    assert compare_generation(own, theirs, PLACE)[0].verdict is verdict


def test_hypotheses_of_other_padding_are_equal() -> None:
    own = {"sequences": Observed(hypotheses([5, 2], [6, 2]))}
    theirs = {"sequences": expected("sequences", hypotheses([5, 2, 1, 1], [6, 2, 1, 1]))}
    (result,) = compare_generation(own, theirs, PLACE)
    assert result.verdict is Verdict.AGREES
