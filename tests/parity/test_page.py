"""The report page: one file that needs nothing else, and says what the report says."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from weightport import cli
from weightport.api import check_parity
from weightport.parity import ParityReport
from weightport.parity.page import page

RUNS = ("image_text", "patch_masks", "generate.greedy")
VOID = {"meta", "link", "img", "br", "line", "polyline"}


class Structure(HTMLParser):
    """Elements in order, their attributes, and whether every one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        return [a for name, a in self.elements if name == tag and style in [*(a.get("class") or "").split(), ""]]


@pytest.fixture(scope="module")
def report(native, whole_reference, tmp_path_factory) -> ParityReport:
    from reference_subsets import subset

    chosen = subset(whole_reference, tmp_path_factory.mktemp("page") / "some.safetensors")(*RUNS)
    return check_parity(native, chosen, dtypes=[torch.float32], invariance=True)


@pytest.fixture
def wrong(native, reference, plant) -> ParityReport:
    plant(lambda model: model.model.encoder.layers[1].fc2.weight.mul_(1.01))
    return check_parity(native, reference("image_text"), dtypes=[torch.float32])


def test_page_is_well_formed_and_needs_nothing_else(report) -> None:
    text = page(report)
    found = Structure(text)
    assert not found.open
    links = [a.get(key) for _, a in found.elements for key in ("src", "href") if a.get(key)]
    assert links and all(link.startswith("data:") for link in links)
    assert not found.named("script") and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and any(a.get("name") == "viewport" for a in found.named("meta"))


def test_page_has_verdict_plot_seams_texts_images_provenance_and_reasons(report) -> None:
    text = page(report)
    for title in ("Error by depth", "Seams", "Generated", "Images", "Provenance", "Dropped tensors", "Environment"):
        assert f"<h2>{title}</h2>" in text
    assert escape(report.verdict) in text and "SHA-256" in text and torch.__version__.partition("+")[0] in text
    found = Structure(text)
    assert len(found.named("polyline", "noise")) == len(found.named("polyline", "error")) > 0
    assert all(escape(dropped["because"]) in text for dropped in report.evidence.dropped) and report.evidence.dropped


def test_images_are_pictures_of_the_reference(report) -> None:
    assert report.evidence.images
    for run, uri in report.evidence.images:
        assert run in RUNS
        assert base64.b64decode(uri.partition(",")[2]).startswith(b"\x89PNG")


def test_departure_stands_in_the_verdict_and_in_the_plot(wrong) -> None:
    text = page(wrong)
    assert "Failed: departs" in text and "Starts at" in text and "model.encoder.layers.1.fc2" in text
    assert Structure(text).named("circle", "wrong")


def test_what_a_reference_says_is_text_and_never_markup(report) -> None:
    hostile = "<script>alert(1)</script>"
    text = page(replace(report, source={"project": hostile}, notes=(hostile,)))
    assert hostile not in text and "&lt;script&gt;" in text


def test_json_holds_what_the_page_shows(report) -> None:
    data = json.loads(report.to_json())
    assert data["evidence"]["provenance"]["family"] == "ofa"
    assert data["evidence"]["dropped"] and data["evidence"]["images"] and data["evidence"]["texts"]
    assert data["localisation"] is None


def test_invariances_are_judged(report) -> None:
    judged = {each.seam: each for each in report.comparisons if each.seam.startswith("invariance")}
    assert set(judged) == {"invariance.batch", "invariance.padding", "invariance.cache"}
    assert report.passed, report.departures


def test_cache_that_forgets_is_found(native, reference, plant) -> None:
    def forgetful(model: torch.nn.Module) -> None:
        forward = model.forward
        model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "past_key_values": None})

    plant(forgetful)
    report = check_parity(native, reference("text"), dtypes=[torch.float32], invariance=True)
    assert {each.seam for each in report.departures} == {"invariance.cache"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_is_judged_by_its_own_noise(native, reference, dtype) -> None:
    report = check_parity(native, reference("image_text", "train.eval_eps0"), dtypes=[dtype])
    assert report.passed, report.departures
    assert {each.seam for each in report.not_compared} == {"loss"}


def test_command_compares_implementations_and_writes_both_files(native, reference, tmp_path) -> None:
    page_file, data = tmp_path / "out.html", tmp_path / "out.json"
    arguments = [native, "--reference", reference("text"), "--dtype", "float32", "--attn", "eager,sdpa"]
    result = CliRunner().invoke(
        cli.port_parity, [*map(str, arguments), "--report", str(page_file), "--json", str(data)]
    )
    assert result.exit_code == 0, result.output
    assert "logits · eager" in result.output and "logits · sdpa" in result.output
    assert {each["attention"] for each in json.loads(data.read_text())["comparisons"]} == {"eager", "sdpa"}
    assert page_file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    refused = CliRunner().invoke(cli.port_parity, [*map(str, arguments[:-1]), "flash"])
    assert refused.exit_code == 2 and "flash is not one of eager, sdpa" in refused.output, refused.output


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_the_plot_without_a_complaint(report, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(page(report), encoding="utf-8")
    shot = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shot.stderr
    assert re.search(r"<svg[^>]*class=\"plot\"", shot.stdout)
