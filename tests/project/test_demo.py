"""`python -m jaxmet`, as a user runs it: what it prints must be so, and is in the README."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxmet as jm
from jaxmet.demo import run as demo

slow = pytest.mark.slow  # two minutes, most of it compilation
ROOT = Path(__file__).parents[2]
DRAWN = all(map(importlib.util.find_spec, ("altair", "vl_convert")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def table(folder):
    """What the command prints in an empty folder: variant → accuracy, change, SQNR."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    if kept := jax.config.jax_compilation_cache_dir:
        env["JAX_COMPILATION_CACHE_DIR"] = kept
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jaxmet"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 4}


@slow
def test_it_leaves_a_report_of_one_of_the_variants_and_nothing_else(table, folder):
    left = [path.name for path in folder.iterdir()]
    if not DRAWN:
        assert left == []
        return
    assert left == [str(demo.REPORT)]
    page = (folder / demo.REPORT).read_text("utf-8")
    assert table[demo.REPORTED][0] in page and "dB predicted" in page


@pytest.mark.parametrize("drawn", [True, False])
def test_it_says_where_the_report_is_or_how_to_get_it(
    drawn, capsys, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: drawn or None)
    monkeypatch.setattr(demo, "run", lambda **options: asked.append(options["report"]))
    demo.main()
    given = capsys.readouterr().out
    assert asked == [demo.REPORT if drawn else None]
    assert (str(tmp_path / "jaxmet-report.html") in given) is drawn
    assert ("pip install altair vl-convert-python" in given) is not drawn


def test_rows_are_shown_as_the_table_prints_them():
    rows = [
        {"variant": name, "accuracy (%)": "92.40 ± 0.67", "change (points)": "–"}
        for name in demo.NAMES
    ]
    printed = repr(jm.Table({key: [row[key] for row in rows] for key in rows[0]}))
    head = dict.fromkeys(rows[0])
    assert [demo._line(row, demo.NAMES) for row in (head, *rows)] == [
        line.rstrip() for line in printed.splitlines()
    ]
    assert set(demo.QUICK) < set(demo.NAMES) and demo.REPORTED in demo.NAMES


def decibels(table):
    return {name: float(row[2]) for name, row in table.items() if row[2][0].isdigit()}


@slow
def test_float_network_is_as_good_as_promised(table):
    assert next(iter(table)) == "variant" and float(table["float"][0].split()[0]) > 92


@slow
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


@slow
@pytest.mark.parametrize("name", [demo.INTEGERS, demo.FILE])
def test_integers_are_what_was_simulated(name, table):
    if name not in demo._shown():
        pytest.skip("needs pip install '.[onnx]'")
    pairs = zip(*(float_of(table[n]) for n in (name, demo.EIGHT)), strict=True)
    assert all(abs(one - two) <= 0.1 for one, two in pairs)


def float_of(row):
    """Accuracy and SQNR."""
    return float(row[0].split()[0]), float(row[2])


@slow
def test_half_of_the_work_is_not_half_of_the_network(table):
    assert 12 < decibels(table)["50 % MACs in float, fold + prune"] < 40


@slow
def test_the_readme_has_this_table(table):
    """Up to what another processor may round otherwise."""
    text = (ROOT / "README.md").read_text("utf-8")
    for name, (accuracy, _, sqnr) in list(table.items())[1:]:
        (row,) = (r for r in text.splitlines() if r.startswith(f"| {name} |"))
        given = [cell.strip() for cell in row.strip("|").split("|")][1:]
        points = [float(cell.split()[0]) for cell in (accuracy, given[0])]
        assert abs(points[0] - points[1]) < 0.5, name
        if sqnr != "–":
            assert abs(float(sqnr) - float(given[2])) < 1.5, name


@slow
def test_quick_shows_three_rows_as_they_finish(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jaxmet", "--quick"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 0 and done.stderr == ""
    )  # no bars where there is no terminal
    lines = [re.split(r"\s{2,}", line)[0] for line in done.stdout.splitlines()]
    assert lines[2:5] == list(demo.QUICK) and list(tmp_path.iterdir()) == []


def test_help_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m jaxmet", "--help"])
    monkeypatch.delitem(sys.modules, "jaxmet.__main__", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module("jaxmet", run_name="__main__")
    assert "Fashion-MNIST" in capsys.readouterr().out
