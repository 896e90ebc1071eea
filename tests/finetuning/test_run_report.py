"""The page of a fine-tuning run: nothing executes, nothing is fetched, no figure is lost and no box is misplaced."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from weightport.errors import OutputError
from weightport.finetuning.data.samples import Objects
from weightport.finetuning.display.gallery import SHOWN, differences, gallery, thumbnail
from weightport.finetuning.display.report import RunSummary, duration, report_page, write_report
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.reports.curves import Axes, Curve, Point, chart, curve, figure, ticks

HOSTILE = "<script>alert(1)</script>\"'&\x00\ud800"
VOID = {"meta", "link", "img", "br"}


def summary(**changes) -> RunSummary:
    history = [
        {"step": step, "epoch": step / 10, "loss": 4.0 / step, "learning_rate": 1e-5, "grad_norm": 1.0}
        for step in range(1, 21)
    ]
    history += [
        {"step": 10, "epoch": 1.0, "eval_loss": 0.75, "eval_anls": 0.25, "eval_runtime": 3.0},
        {"step": 20, "epoch": 2.0, "eval_loss": 0.5, "eval_anls": 0.875, "eval_runtime": 3.0},
        {"step": 20, "epoch": 2.0, "train_runtime": 3725.0, "train_samples_per_second": 12.5, "train_loss": 0.9},
    ]
    plain = RunSummary(
        title="tiny",
        command="port-finetune tiny --data train",
        settings={"recipe": "docvqa", "training": {"learning_rate": 1e-6, "schedule": {"name": "linear"}}},
        trainable=[("vision", 0, 90), ("decoder", 10, 10)],
        history=history,
        metrics={"eval_anls": 0.875, "eval_runtime": 3.0},
        predictions=[Prediction(3, "val.jsonl, line 4", "a.png", "who?", "J. Smith", ("J. Smith",))],
        pictures={3: Image.new("RGB", (640, 320), "red")},
        notes=["2 samples were skipped"],
    )
    return replace(plain, **changes)


class Page(HTMLParser):
    """Elements with their attributes; fails on what does not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"{tag} closes nothing"

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [each for each in found if not style or style in (each.get("class") or "").split()]


def test_page_is_well_formed_and_says_every_headline_figure():
    page = Page(report_page(summary()))
    for said in ("0.875", "20", "1 h 2 min", "12.5", "10.00 %", "0.5", "training.learning_rate"[9:], "schedule.name"):
        assert said in page.words
    assert "runtime" not in page.words


def test_page_needs_no_script_and_no_network():
    written = report_page(summary())
    page = Page(written)
    assert not page.all("script") and not page.all("iframe")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in written and "@import" not in written and "@font-face" not in written
    assert "prefers-color-scheme: dark" in written


@pytest.mark.parametrize(
    "changes",
    [
        {"title": HOSTILE},
        {"command": HOSTILE},
        {"settings": {HOSTILE: HOSTILE, "group": {HOSTILE: [HOSTILE]}, HOSTILE * 2: {"a": 1}}},
        {"trainable": [(HOSTILE, 1, 2)]},
        {"history": [{"step": 1, "loss": 1.0, f"eval_{HOSTILE}": 1.0}]},
        {"metrics": {HOSTILE: 1.0}},
        {"notes": [HOSTILE]},
        {"predictions": [Prediction(3, HOSTILE, HOSTILE, HOSTILE, HOSTILE, (HOSTILE + "x", HOSTILE))]},
        {
            "predictions": [
                Prediction(
                    3,
                    "p",
                    "k",
                    "q",
                    "a",
                    (),
                    Objects((HOSTILE,), ((0, 0, 1, 1),), (2, 2)),
                    Objects((HOSTILE,), ((0, 0, 1, 1),), (2, 2)),
                )
            ]
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_hostile_text_stays_text_wherever_it_comes_from(changes, tmp_path):
    write_report(tmp_path / "report.html", summary(**changes))
    page = Page((tmp_path / "report.html").read_bytes().decode("utf-8"))
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.words
    assert "\x00" not in page.words


def test_an_empty_run_has_a_page():
    page = Page(report_page(RunSummary("", "", {}, [], [], {}, [], {}, [])))
    assert "No loss was logged" in page.words
    assert "nan" not in page.words


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e308, -1e308])
def test_a_loss_that_is_no_number_is_marked_and_breaks_no_figure(broken):
    history = [{"step": step, "loss": broken if step == 3 else 1.0 / step} for step in range(1, 6)]
    written = report_page(summary(history=history, metrics={"anls": broken}, predictions=[]))
    page = Page(written)
    assert len(page.all("text", "broken")) == 1
    assert len(page.all("polyline")) == 2, "the line must not bridge the step without a loss"
    assert not re.search(r'(?:points|cx|cy|x|y|x1|y1)="[^"]*(?:nan|inf)', written)


def test_only_losses_that_are_no_numbers_still_give_a_page():
    page = Page(report_page(summary(history=[{"step": 1, "loss": math.nan}], metrics={}, predictions=[])))
    assert len(page.all("text", "broken")) == 1
    assert len(page.all("li", "bad")) == 1


def test_history_with_strange_entries_is_read_as_far_as_it_goes():
    history = [{}, {"loss": 1.0}, {"step": None, "loss": 1.0}, {"step": 5, "loss": "high"}, {"step": 7, "loss": 2.0}]
    assert curve(history, "loss").points == (Point(7.0, 2.0),)


def test_points_lie_where_the_axis_says():
    drawn = chart([Curve("loss", (Point(0, 1.0), Point(50, 3.0), Point(100, 2.0)))], label="loss", height=200)
    page = Page(drawn)
    dots = page.all("circle", "dot")
    assert [dot["cx"] for dot in dots] == ["0.00%", "50.00%", "100.00%"]
    axes = Axes.of([Curve("loss", (Point(0, 1.0), Point(100, 3.0)))], 200)
    assert axes.y(axes.high) == 0 and axes.y(axes.low) == 200
    # The line and the dots are drawn in different units and must not part.
    line = [tuple(map(float, pair.split(","))) for pair in page.all("polyline")[0]["points"].split()]
    assert [(x / 10, y) for x, y in line] == [(float(dot["cx"][:-1]), float(dot["cy"])) for dot in dots]
    # A tick's text stands at its grid line: 2 lies midway between 1 and 3.
    heights = [float(dot["cy"]) for dot in dots]
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [(0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 2000, 5, [0, 500, 1000, 1500, 2000]), (-1, 1, 2, [-1, 0, 1])],
)
def test_ticks_are_round_figures(low, high, most, expected):
    assert ticks(low, high, most) == expected


@pytest.mark.parametrize(("low", "high"), [(0, 1e-12), (1e99, 1.1e99), (0.1, 0.1000001), (-1e-300, 1e-300)])
def test_ticks_of_any_range_are_few_and_within_it(low, high):
    found = ticks(low, high, 5)
    assert 1 <= len(found) <= 11
    assert all(low - (high - low) * 1e-6 <= tick <= high + (high - low) * 1e-6 for tick in found)


def test_a_spike_survives_thinning_and_pages_stay_small():
    history = [{"step": step, "loss": 90.0 if step == 31_337 else 1.0} for step in range(1, 100_001)]
    drawn = chart([curve(history, "loss")], label="loss")
    heights = [float(pair.split(",")[1]) for pair in Page(drawn).all("polyline")[0]["points"].split()]
    assert min(heights) < 20 and sum(height < 20 for height in heights) == 1
    assert len(drawn) < 100_000


def test_smoothing_keeps_a_constant_and_shortens_noise():
    flat = Curve("loss", tuple(Point(step, 2.0) for step in range(100)))
    assert {point.value for point in flat.smoothed()} == {2.0}
    noisy = Curve("loss", tuple(Point(step, float(step % 2)) for step in range(100)))
    assert max(abs(point.value - 0.5) for point in noisy.smoothed()[5:-5]) < 0.2
    assert Curve("loss", flat.points[:10]).smoothed() == ()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1200, "1,200"), (0.31415926, "0.3142"), (5e-5, "5e-05"), (math.nan, "nan"), (-math.inf, "-inf"), (0.0, "0")],
)
def test_figures_are_written_as_people_read_them(value, shown):
    assert figure(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(7.25, "7.2 s"), (59.99, "60.0 s"), (1234.5, "20 min 34 s"), (3725, "1 h 2 min"), (90_000, "25 h 0 min")],
)
def test_durations_are_said_in_their_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


def test_pictures_are_small_jpegs_of_the_same_shape():
    uri = thumbnail(Image.new("RGBA", (1280, 640), (255, 0, 0, 255)))
    small = Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert small.format == "JPEG" and small.size == (320, 160)
    red, green, blue = small.getpixel((100, 100))
    assert red > 240 and green < 15 and blue < 15


def test_a_small_picture_is_not_blown_up_and_the_callers_is_not_changed():
    picture = Image.new("RGB", (500, 100))
    thumbnail(picture)
    assert picture.size == (500, 100)
    small = Image.open(BytesIO(base64.b64decode(thumbnail(Image.new("L", (8, 4))).partition(",")[2])))
    assert small.size == (8, 4)


def test_boxes_lie_in_percent_of_their_own_picture_and_never_outside():
    expected = Objects(("dog",), ((10, 20, 60, 120),), (100, 200))
    found = Objects(
        ("dog", "cat", "bird"), ((5, 5, 10, 400), (90, 30, -20, 60), (math.nan, 0, 1, 1)), (50, 200), (0.5,) * 3
    )
    cards = Page(gallery([Prediction(0, "p", "k", "<OD>", "", (), found, expected)], {0: Image.new("RGB", (50, 100))}))
    boxes = [(box["class"], *(box[side] for side in ("x", "y", "width", "height"))) for box in cards.all("rect")]
    assert boxes == [
        ("expected", "10.00%", "10.00%", "50.00%", "50.00%"),
        ("found", "10.00%", "2.50%", "10.00%", "97.50%"),
        ("found", "0.00%", "15.00%", "100.00%", "15.00%"),
    ]
    assert "dog 0.50" in cards.words and "3 boxes: 1 bird, 1 cat, 1 dog" in cards.words


def test_words_and_chinese_characters_that_differ_are_marked_and_no_other():
    said, wanted = differences("paid on 12 March 1978", "paid on 12 March 1987")
    assert said == 'paid on 12 March <mark class="surplus">1978</mark>'
    assert wanted == 'paid on 12 March <mark class="missing">1987</mark>'
    said, wanted = differences("一只红色的球", "一个红色的球")
    assert said == '一<mark class="surplus">只</mark>红色的球'
    assert wanted == '一<mark class="missing">个</mark>红色的球'


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("same", "same"), ("abc", "xyz"), ("", "xyz"), ("a" * 3000, "a" * 2999 + "b"), ("a\n  b", "")],
)
def test_texts_without_anything_worth_marking_are_shown_plain(said, wanted):
    assert differences(said, wanted) == (said, wanted)


def test_marked_texts_lose_no_character():
    said, wanted = 'a_b <i> "x"\n  1,2 中文abc\u3000é', 'a_b <b> "y"\n  1,3 中国abc\u3000e'
    marked = differences(said, wanted)
    assert [Page(each).words for each in marked] == [said, wanted]


def test_the_nearest_reference_is_the_one_compared():
    predictions = [Prediction(0, "p", "k", "q", "12 March 1978", ("nothing of it", "12 March 1987"))]
    written = gallery(predictions, {})
    assert '<mark class="missing">1987</mark>' in written and "differs" in written
    right = gallery([replace(predictions[0], text="nothing of it")], {})
    assert "equals a reference" in right and "differs" not in right


def test_a_large_data_set_shows_its_samples_with_pictures():
    predictions = [Prediction(i, f"line {i}", "k", "q", "a", ("a",)) for i in range(1000)]
    shown = Page(gallery(predictions, {5: Image.new("RGB", (4, 4)), 900: Image.new("RGB", (4, 4))}))
    assert len(shown.all("article")) == 2 and len(shown.all("img")) == 2
    assert "2 of 1,000 samples" in shown.words
    assert len(Page(gallery(predictions, {})).all("article")) == SHOWN


def test_the_same_summary_gives_the_same_bytes(tmp_path):
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, summary())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_report_replaces_an_earlier_one_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run" / "report.html"
    write_report(target, summary())
    write_report(target, summary(title="second"))
    before = target.read_bytes()
    assert b"<h1>second</h1>" in before
    with pytest.raises(AttributeError, match="no attribute 'convert'"):
        write_report(target, summary(pictures={3: "no picture"}))
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="part of the path is a file"):
        write_report(tmp_path / "file" / "report.html", summary())


def test_a_trained_share_never_rounds_to_all_or_nothing():
    page = Page(report_page(summary(trainable=[("adapter", 1, 10**9), ("rest", 10**9 - 1, 10**9)])))
    assert "0.01 %" in page.words and "99.99 %" in page.words


def test_details_of_metrics_are_folded_away_and_not_drawn():
    figures = {"bleu-4": 20.0, "bleu-1": 41.0, "bleu-brevity-penalty": 0.875, "ap/cat": 0.5}
    page = report_page(
        replace(
            summary(),
            metrics=figures,
            history=[{"step": 1, "eval_loss": 1.0, **{f"eval_{k}": v for k, v in figures.items()}}],
        )
    )
    shown, _, folded = page.partition("<details>")
    assert "bleu-4" in shown and not any(name in shown for name in ("bleu-1", "brevity", "ap/cat"))
    assert all(name in folded.partition("</details>")[0] for name in ("bleu-1", "0.875", "ap/cat"))
