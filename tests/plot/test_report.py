"""The report: one file that a browser opens without network and draws completely."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plot import (
    noise_table,
    ratio_table,
    rounding_table,
    sensitivity_table,
    table_of,
)

import jaxmet as jm
from by_hand import x64
from jaxmet.plot.html_report import reasons
from jaxmet.plot.page import as_json
from jaxmet.plot.verdict import size_over_float

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

EVIL = "</script><script>console.error('x')</script>"
NAMES = ["a.b[0]", "größe", "<b>bold</b>"]


class Model(NamedTuple):
    params: Any
    graph: jm.Graph
    quantizers: jm.Quantizers
    batch: jax.Array


@pytest.fixture(scope="module")
def model() -> Model:
    rng = np.random.default_rng(1)
    params = {
        n: {"w": jax.device_put(np.float32(rng.normal(size=(6, 6))))} for n in NAMES
    }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for name in NAMES:
            x = jax.nn.relu(x @ params[name]["w"])
        return x

    batch = jax.device_put(np.float32(rng.normal(size=(4, 6))))
    graph = jm.trace(apply, params, batch)
    quantizers = jm.calibrate(params, graph, [batch], progress=False)
    return Model(params, graph, quantizers, batch)


@pytest.fixture(scope="module")
def full(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it, and names that are HTML."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = [*NAMES, EVIL]
    other = table_of(("layer", EVIL), [("stem", EVIL), ("head", math.nan)])
    other.title = "Something else"
    jm.report(
        path,
        model.params,
        model.graph,
        quantizers=model.quantizers,
        batch=model.batch,
        before=jax.tree.map(lambda w: 2 * w, model.params),
        tables=[
            sensitivity_table(names),
            noise_table(names),
            ratio_table(names),
            rounding_table(names),
            other,
            jm.Table({name: [] for name in noise_table(["x"]).columns}),
        ],
        scores={"float": 0.9153, EVIL: 0.89},
        settings={"bits": 8, "note": EVIL},
        title=f"Report {EVIL}",
    )
    return path


def without_scripts(path: Path) -> str:
    """The page as it is before anything is drawn."""
    return re.sub(r"<script.*?</script>", "", path.read_text("utf-8"), flags=re.S)


class Drawn(HTMLParser):
    """Of a page in a browser: the places of charts, what they must and do hold."""

    def __init__(self) -> None:
        super().__init__()
        self.charts: dict[str, dict[str, Any]] = {}
        self.inside: list[tuple[str, Any, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        chart, rows = (self.inside[-1][1:]) if self.inside else (None, False)
        if "data-rows" in found:
            chart = found["id"]
            state = found.get("data-state")
            self.charts[chart] = {"rows": int(found["data-rows"]), "state": state}
            self.charts[chart]["marks"] = 0
        elif rows and chart and "aria-roledescription" in found:
            self.charts[chart]["marks"] += 1
        classes = found.get("class", "").split()
        rows = any(re.fullmatch(r"rows(_\d+)?_marks", c) for c in classes)
        if tag not in ("meta", "link", "br", "input", "img", "hr"):
            self.inside.append((tag, chart, rows))

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop()[0] != tag:
            pass


class Opened(NamedTuple):
    dom: str
    log: str
    charts: dict[str, dict[str, Any]]
    seconds: float


@pytest.fixture(scope="module")
def opened(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium here: nothing to open the report with")
    home = tmp_path_factory.mktemp("chromium")
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={home}",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        "--dump-dom",
        full.as_uri(),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - start
    parser = Drawn()
    parser.feed(done.stdout)
    return Opened(done.stdout, done.stderr, parser.charts, seconds)


@pytest.mark.slow
def test_every_chart_is_drawn_with_a_mark_for_each_row(opened: Opened) -> None:
    rows = [c["rows"] for c in opened.charts.values()]
    # graph, relative ranges, ranges, compare, sensitivity, noise, ratios, rounding
    assert rows[1:3] == [2 * 3, 2 * 3 * 6] and rows[4:] == [2 * 4, 4, 3 * 4, 4]
    assert min(rows) > 0
    for name, chart in opened.charts.items():
        assert chart["state"] == "drawn", name
        assert chart["marks"] == chart["rows"], name


@pytest.mark.slow
def test_the_browser_has_nothing_to_complain_about(opened: Opened) -> None:
    stated = [line for line in opened.log.splitlines() if "CONSOLE" in line]
    assert not stated
    assert "net::ERR" not in opened.log
    assert opened.seconds < 30


def test_nothing_is_loaded(full: Path) -> None:
    text = full.read_text("utf-8")
    assert not re.search(r"<script[^>]*\bsrc\b", text)
    page = without_scripts(full)
    loading = re.findall(r"<(?:link|img|iframe|source|object|embed)\b[^>]*>", page)
    assert loading == ['<link rel="icon" href="data:,">']
    assert "@import" not in page and "url(" not in page
    assert text.count("window.vegaEmbed=") == 1  # Vega is inside, once
    assert len(text) < 5e6


def test_what_users_named_is_text(full: Path) -> None:
    text = full.read_text("utf-8")
    assert EVIL not in text
    assert html.escape(EVIL) in text
    scripts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)
    assert len(scripts) == text.count("data-rows=")
    specs = [json.loads(script) for script in scripts]
    assert any(EVIL in json.dumps(s, ensure_ascii=False) for s in specs)
    hostile = as_json({"a": f"<!--{EVIL}\u2028"})
    assert not re.search("[<>&\u2028]", hostile)
    assert json.loads(hostile) == {"a": f"<!--{EVIL}\u2028"}


def test_it_says_what_it_was_given(full: Path, model: Model) -> None:
    text = full.read_text("utf-8")
    heads = re.findall(r"<h2>(.*?)</h2>", without_scripts(full))
    assert heads[:5] == [
        "In short",
        "The model",
        "What is quantized, and what is not",
        "Ranges of weights, before and after",
        "Where the error enters",
    ]
    assert "Something else" in heads and heads[-2:] == ["Settings", "Versions"]
    assert "0.9153" in text and jax.__version__ in text and np.__version__ in text
    for name, why in model.quantizers.skipped:
        assert html.escape(name) in text and html.escape(why) in text
    for layer in model.graph.layers:
        assert f"<td>{html.escape(layer.name)}</td>" in text


def in_short(path: Path) -> str:
    (found,) = re.findall(
        r"<h2>In short</h2>(.*?)</section>", path.read_text("utf-8"), re.S
    )
    return found


def test_it_begins_with_what_costs_most_and_what_helps(
    model: Model, tmp_path: Path
) -> None:
    """The gain is that of the noise table's own columns, and the link leads to the table."""
    given = model.params, model.graph
    noise = jm.noise(*given, model.quantizers, [model.batch], progress=False)
    path = tmp_path / "short.html"
    scores = {"accuracy": 0.9153}
    jm.report(path, *given, quantizers=model.quantizers, tables=[noise], scores=scores)
    text = in_short(path)
    assert "0.9153" in text and f"{noise['SQNR (dB)'][-1]:.4g}" in text
    *rows, _ = sorted(noise, key=lambda row: row["share"])
    worst = rows[-1]
    power = 10 ** (-worst["SQNR (dB)"] / 10)
    left = 10 ** (-worst["16 bits"] / 10) / power
    gain = -10 * math.log10(1 - worst["share"] * (1 - left))
    rule = f"jm.Rule({worst['tensor']!r}, {worst['kind']}_bits=16)"
    assert html.escape(f"rules=[{rule}]") in text and f"{gain:+.1f} dB" in text
    assert f"{100 * worst['share']:.0f} % of the noise" in text
    (part,) = set(re.findall(r'href="#(part\d+)"', text))
    page = path.read_text("utf-8")
    assert f'<section id="{part}"><h2>Noise of every quantizer</h2>' in page


def test_without_noise_it_begins_with_where_error_enters(
    model: Model, tmp_path: Path
) -> None:
    given = model.params, model.graph, model.quantizers
    table = jm.compare(*given, model.batch)
    worst = min(table, key=lambda row: row["own SQNR (dB)"] or math.inf)
    path = tmp_path / "short.html"
    jm.report(path, *given[:2], quantizers=given[2], batch=model.batch)
    text = in_short(path)
    assert f"{html.escape(worst['node'])}: own error" in text and "jm.noise(" in text


def test_the_size_is_that_of_integers() -> None:
    params = {"w": jnp.ones((6, 5)), "b": jnp.ones(5), "h": jnp.ones((5, 4), "float16")}
    apply = lambda p, x: (x @ p["w"] + p["b"][None]) @ p["h"].astype(jnp.float32)
    x = jnp.ones((2, 6))
    graph = jm.trace(apply, params, x)
    rules = [jm.Rule("h", weight_bits=4)]
    config = jm.QuantConfig(bias="int32", rules=rules)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    before, after = 30 * 4 + 5 * 4 + 20 * 2, 30 + 5 * 4 + 20 / 2
    assert size_over_float(params, quantizers) == pytest.approx(after / before)
    assert size_over_float(params, jm.Quantizers()) == 1.0
    with x64(True):
        wide = {"w": jnp.ones((6, 5), jnp.float64)}
        assert size_over_float(wide, jm.Quantizers()) == 1.0


def test_only_what_was_given_is_there(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "small.html"
    jm.report(path, model.params, model.graph)
    heads = re.findall(r"<h2>(.*?)</h2>", without_scripts(path))
    assert heads == ["The model", "Ranges of weights", "Versions"]
    assert [p.name for p in tmp_path.iterdir()] == ["small.html"]
    jm.report(path, model.params, model.graph, quantizers=model.quantizers)
    assert "What is quantized" in path.read_text("utf-8")


def test_a_network_of_fifty_layers_is_small(tmp_path: Path) -> None:
    names = [f"block{i}/conv" for i in range(51)]
    weight = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(8, 8))))
    params = dict.fromkeys(names, weight)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x

    graph = jm.trace(apply, params, jnp.ones((1, 8)))
    path = tmp_path / "report.html"
    start = time.perf_counter()
    tables = [sensitivity_table(names * 2), noise_table(names * 2), ratio_table(names)]
    jm.report(path, params, graph, before=params, tables=tables)
    assert path.stat().st_size < 5e6
    assert time.perf_counter() - start < 10


def test_what_stays_in_float_is_counted_by_reason() -> None:
    left = jm.Table({"tensor": list("abcde"), "why": ["x", "y", "x", "x", "x"]})
    assert list(reasons(left)) == [
        {"why": "x", "how many": 4, "tensor": "a, c, d, …"},
        {"why": "y", "how many": 1, "tensor": "b"},
    ]


def test_bad_arguments_are_refused_before_any_work(
    model: Model, tmp_path: Path
) -> None:
    params, graph, quantizers, batch = model
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="jaxmet.report: .* is a folder"):
        jm.report(tmp_path, params, graph)
    with pytest.raises(ValueError, match="jaxmet.report: there is no folder"):
        jm.report(tmp_path / "none" / "report.html", params, graph)
    with pytest.raises(ValueError, match="jaxmet.report: entry 1 of tables"):
        jm.report(path, params, graph, tables=[noise_table(["a"]), {"a": 1}])
    with pytest.raises(ValueError, match="jaxmet.report: tables is one table"):
        jm.report(path, params, graph, tables=noise_table(["a"]))
    with pytest.raises(ValueError, match="jaxmet.report: the title is of type int"):
        jm.report(path, params, graph, title=5)
    with pytest.raises(ValueError, match="jaxmet.report: parameter"):
        jm.report(path, jax.tree.map(lambda w: w[:, :3], params), graph)
    with pytest.raises(ValueError, match="jaxmet.report: batch is all the data"):
        data = jm.batched(batch, batch_size=2)
        jm.report(path, params, graph, quantizers=quantizers, batch=data)
    for several in ([batch], iter([batch])):
        with pytest.raises(ValueError, match="jaxmet.report: batch .* Give one batch"):
            jm.report(path, params, graph, quantizers=quantizers, batch=several)
    with pytest.raises(ValueError, match="jaxmet.report: the tree has no parameter"):
        jm.report(path, {"other": batch}, graph)
    for before in ("x", {"other": params}):
        with pytest.raises(
            ValueError, match="jaxmet.report: before is no tree of this"
        ):
            jm.report(path, params, graph, before=before)
    other = jm.Quantizers({"other": jm.Quantizer(bits=8)})
    with pytest.raises(ValueError, match="report: the quantizers have one for 'other'"):
        jm.report(path, params, graph, quantizers=other)
    with pytest.raises(ValueError, match="jaxmet.report: scores is of type list"):
        jm.report(path, params, graph, scores=[1])
    with pytest.raises(
        ValueError, match="jaxmet.report: settings is of type QuantConf"
    ):
        jm.report(path, params, graph, settings=jm.QuantConfig())
    with pytest.raises(ValueError, match="jaxmet.report: tables is of type int"):
        jm.report(path, params, graph, tables=3)
    with pytest.raises(ValueError, match="'all' of scores is traced"):
        jax.jit(lambda x: jm.report(path, params, graph, scores={"all": x}))(1.0)
    with pytest.raises(ValueError, match="the parameters are traced"):
        jax.jit(lambda p: jm.report(path, p, graph))(params)
    assert not list(tmp_path.iterdir())


def test_it_says_what_counts_as_float(model: Model, tmp_path: Path) -> None:
    params, graph, quantizers, batch = model
    path = tmp_path / "report.html"
    scaled = jax.tree.map(lambda w: 3 * w, params)
    for before, stated in (
        (None, "Float is the same tree without quantizers."),
        (params, "Float is the tree from before."),
        (scaled, "the tree from before are scaled in another way"),
    ):
        jm.report(
            path, params, graph, quantizers=quantizers, batch=batch, before=before
        )
        assert stated in path.read_text("utf-8")


def test_a_read_only_path(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    path.chmod(0o444)
    if os.access(path, os.W_OK):  # root may write everything
        pytest.skip("this user may write read-only files")
    with pytest.raises(ValueError, match="jaxmet.report: .* is read-only"):
        jm.report(path, model.params, model.graph)
    assert path.read_text() == "old"


def test_a_folder_that_takes_no_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(ValueError, match=r"nothing can be written .*Permission denied"):
        jm.report(tmp_path / "report.html", model.params, model.graph)


def test_a_failed_write_leaves_the_old_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def replace(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        jm.report(path, model.params, model.graph)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
