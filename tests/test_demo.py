"""The main job on a few test images: what it shows must be so."""

import runpy
import sys

import pytest

from jaxmet.demo.run import run

pytestmark = pytest.mark.slow  # a hundred seconds of compilation


@pytest.fixture(scope="module")
def table():
    return run(test_images=300, progress=False)


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
