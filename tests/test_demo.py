"""The main job on a few test images: what it shows must be so."""

import importlib.util
import runpy
import sys

import pytest

import jaxmet as jm
from jaxmet.demo import run as demo
from jaxmet.demo.run import REPORTED, run

pytestmark = pytest.mark.slow  # a hundred seconds of compilation


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if importlib.util.find_spec("altair") is None:
        return None
    return tmp_path_factory.mktemp("demo") / "report.html"


@pytest.fixture(scope="module")
def table(report):
    return run(test_images=300, progress=False, report=report)


def test_the_report_shows_one_of_the_variants(table, report):
    if report is None:
        pytest.skip("pictures need the extra 'plot'")
    page = report.read_text("utf-8")
    (row,) = table.where(variant=REPORTED)
    assert row["accuracy (%)"] in page and "dB foretold" in page


@pytest.mark.parametrize("drawn", [True, False])
def test_it_says_where_the_report_is_or_how_to_get_it(
    drawn, capsys, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: drawn or None)
    monkeypatch.setattr(
        demo, "run", lambda report: asked.append(report) or jm.Table({"a": [1]})
    )
    demo.main()
    told = capsys.readouterr().out
    assert asked == [demo.REPORT if drawn else None]
    assert (str(tmp_path / "jaxmet-report.html") in told) is drawn
    assert ("pip install 'jaxmet[plot]'" in told) is not drawn


def decibels(table):
    pairs = zip(table["variant"], table["SQNR (dB)"], strict=True)
    return {name: float(value) for name, value in pairs if name != "float"}


def test_float_network_is_as_good_as_promised(table):
    accuracy = float(table["accuracy (%)"][0].split()[0])
    assert table["variant"][0] == "float" and accuracy > 88


def test_each_step_wins_back_what_it_should(table):
    found = decibels(table)
    gain = found["W8A8 per tensor, fold + equalize"] - found["W8A8 per tensor, fold"]
    assert gain > 5
    corrected = found["W8A8 per tensor, fold + equalize + correct"]
    assert corrected > found["W8A8 per tensor, fold + equalize"]
    assert found["W8A8 per tensor, the same without data"] > corrected - 8
    four = found["W4A8 per channel, fold + correct"]
    assert four > found["W4A8 per channel, fold"] + 1
    assert found["W4A8 per channel, fold + adaround"] > four + 1
    assert found["W4A8 per channel, fold"] < found["W8A8 per channel, fold"] - 10


def test_half_of_the_work_is_not_half_of_the_network(table):
    assert 12 < decibels(table)["50 % MACs in float, fold + prune"] < 40


def test_help_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m jaxmet", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("jaxmet", run_name="__main__")
    assert "Fashion-MNIST" in capsys.readouterr().out
