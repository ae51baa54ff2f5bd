"""The page: whole, self-contained, escaped, labelled; drawn in a browser by hand, checked by its text here."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.forms import FORMS
from convsplit.report.page import SHAPES
from convsplit.report.plots import STYLES
from convsplit.report.svg import DASHES, MARKS

pytest.importorskip("jinja2")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None: ...


@pytest.fixture(scope="module")
def results() -> tuple[convsplit.report.Report, convsplit.report.Frontier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)).eval()
    inputs = torch.randn(2, 3, 9, 9)
    report = convsplit.compare(convsplit.convert(model, forms="dw-pw", rank=1), model, inputs)
    return report, convsplit.frontier(model, batches=inputs, budgets=(0.8, 0.5, 0.3), forms="dw-pw")


def page_of(report: convsplit.report.Report, frontier: convsplit.report.Frontier | None, folder: Path) -> str:
    report.to_html(folder / "report.html", frontier=frontier)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_whole_and_needs_no_network(results: tuple, tmp_path: Path) -> None:
    for frontier in (None, results[1]):
        text = page_of(results[0], frontier, tmp_path)
        parser = Balance()
        parser.feed(text)
        assert not parser.open
        assert not re.search(r"(src|href)=|@import|url\(|https?://", text)


def test_verdict_and_totals_come_before_layers(results: tuple, tmp_path: Path) -> None:
    text = page_of(*results, tmp_path)
    places = [text.index(part) for part in (results[0].verdict.headline, 'class="tiles"', "<figure", "<tbody>")]
    assert places == sorted(places)


def test_every_layer_and_reason_is_there(results: tuple, tmp_path: Path) -> None:
    report, frontier = results
    text = page_of(report, frontier, tmp_path)
    for layer in report.layers:
        assert f'scope="row" data-value="{report.layers.index(layer) + 1}">{layer.name}</th>' in text
    assert "already pointwise" in text


def test_plots_are_well_formed_and_labelled(results: tuple, tmp_path: Path) -> None:
    drawn = re.findall(r'<svg class="plot".*?</svg>', page_of(*results, tmp_path), re.DOTALL)
    assert len(drawn) == 3 + len(results[1].curves)
    for picture in drawn:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert all(re.fullmatch(r"[-\d.]+", mark.get("cx", "0")) for mark in root.iter("circle"))


def test_names_are_escaped(results: tuple, tmp_path: Path) -> None:
    report = replace(results[0], model="<b>x", layers=(replace(results[0].layers[0], name="a<b&c"),))
    text = page_of(report, None, tmp_path)
    assert "<b>x" not in text
    assert "a<b&c" not in text
    assert "a&lt;b&amp;c" in text


def test_page_of_a_report_without_drift_or_layers(results: tuple, tmp_path: Path) -> None:
    bare = replace(results[0], layers=(), drift=None, agreement=None, kept=())
    assert "Not worth splitting" in page_of(bare, None, tmp_path)
    unseen = replace(results[0].layers[0], local=None, accumulated=None, macs=None)
    assert "<table" in page_of(replace(results[0], layers=(unseen,)), None, tmp_path)
    exact = convsplit.report.Drift(0.0, 1.0, 0.0)
    perfect = replace(results[0].layers[0], local=exact, accumulated=exact)
    assert "inf dB" in page_of(replace(results[0], layers=(perfect,), drift=exact), None, tmp_path)


def test_every_form_is_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 8)).eval()
    inputs, forms = torch.randn(2, 8, 3, 3), (*FORMS, "pw-pw")
    converted = convsplit.convert(model, forms=forms, linear=True, budget=convsplit.Budget(params=0.25))
    report = convsplit.compare(converted, model, inputs)
    assert {layer.form for layer in report.layers} >= {"pw-pw"}
    text = page_of(
        report, convsplit.frontier(model, inputs[:1], budgets=(0.7, 0.5), forms=forms, linear=True), tmp_path
    )
    assert text.count("pw-pw") > 3
    assert 'class="mark s3"' in text
    for form, (_, shape) in SHAPES.items():
        assert form in {*FORMS, "pw-pw"}
        assert shape in MARKS
    assert len(DASHES) == len(SHAPES) == len(STYLES)
