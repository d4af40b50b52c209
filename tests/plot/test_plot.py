"""Pictures: each draws what its table says, mark by mark in the rendered SVG."""

import functools
import json
import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.plot.channel_ranges import relative, weights_of, worst_first
from jaxmet.plot.drawing import drawn_rows, version_of_vega_lite
from jaxmet.plot.node_positions import lanes, places
from jaxmet.plot.pareto import front
from jaxmet.plot.relative_ranges import relative_table
from jaxmet.plot.tables import REPORTS, kind_of
from zoo import model

pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")

STRANGE = ["a.b[0]", "größe/µ", 'it\'s "x"', "c:d\\e", "<i>&amp;"]
SVG = "{http://www.w3.org/2000/svg}"


def svg_of(chart: Any) -> ET.Element:
    return rendered(json.dumps(chart.to_dict()))


@functools.lru_cache(maxsize=4)
def rendered(spec: str) -> ET.Element:
    version = version_of_vega_lite("test")
    return ET.fromstring(vl_convert.vegalite_to_svg(json.loads(spec), version))


def marks(chart: Any) -> int:
    """How many marks the rendered picture has for the rows of its table."""
    count = 0
    for group in svg_of(chart).iter(f"{SVG}g"):
        classes = group.get("class", "").split()
        if any(re.fullmatch(r"rows(_\d+)?_marks", name) for name in classes):
            count += sum(
                child.get("aria-roledescription") is not None for child in group
            )
    assert count == drawn_rows(chart.to_dict())
    return count


def texts(chart: Any) -> list[str]:
    return ["".join(t.itertext()) for t in svg_of(chart).iter(f"{SVG}text")]


def values_of(chart: Any, view: str = "rows") -> list[dict[str, Any]]:
    """The records after the marks of the rows."""
    spec, found = chart.to_dict(), []

    def visit(part: Any, inherited: Any) -> None:
        own = part.get("data", inherited)
        if part.get("name", "").partition("_")[0] == view:
            found.extend(own.get("values") or spec["datasets"][own["name"]])
        inner = [part["spec"]] if "spec" in part else []
        for key in ("layer", "hconcat", "vconcat", "concat"):
            inner += part.get(key, [])
        for one in inner:
            visit(one, own)

    visit(spec, None)
    return found


def sensitivity_table(names: list[str], bits: tuple[int, ...] = (8,)) -> jm.Table:
    rows = [
        (
            n,
            f"at {n}",
            ("weight", "activation")[i % 2],
            b,
            0.9 - 0.01 * i,
            0.7 + 0.01 * i,
        )
        for i, n in enumerate(names)
        for b in bits
    ]
    rows += [
        ("(all)", None, kind, b, 0.7, 0.92)
        for kind in ("weight", "activation", None)
        for b in bits
    ]
    return table_of(REPORTS["sensitivity"], rows)


def noise_table(names: list[str]) -> jm.Table:
    share = np.arange(1, len(names) + 1) / np.arange(1, len(names) + 1).sum()
    rows = [
        (
            n,
            n,
            ("weight", "activation")[i % 2],
            8,
            40 - 10 * math.log10(s),
            float(s),
            None,
        )
        for i, (n, s) in enumerate(zip(names, share))
    ]
    rows.append(("(all)", None, None, None, 40.0, 1.0, None))
    return table_of((*REPORTS["noise"], "clipped"), rows)


def compare_table(names: list[str]) -> jm.Table:
    rows = [(n, 40.0 - i, 42.0 + i, 0.5, None) for i, n in enumerate(names)]
    return table_of((*REPORTS["compare"], "note"), rows)


def ratio_table(names: list[str]) -> jm.Table:
    ratios = (0.25, 0.5, 1.0)
    rows = [
        (n, None, r, 0.9 * r + 0.01 * i) for i, n in enumerate(names) for r in ratios
    ]
    rows.append(("(all)", None, 1.0, 0.93))
    return table_of(("layer", "tied", "ratio", "score"), rows)


def rounding_table(names: list[str]) -> jm.Table:
    rows = [(n, 0.2 + i, 1.0 + i, 0.1, 0.3, None) for i, n in enumerate(names)]
    return table_of((*REPORTS["rounding_loss"], "note"), rows)


def table_of(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> jm.Table:
    return jm.Table(dict(zip(names, zip(*rows, strict=True), strict=True)))


TABLES = {
    "sensitivity": (jm.plot.sensitivity, sensitivity_table, 2),
    "noise": (jm.plot.noise, noise_table, 1),
    "compare": (jm.plot.compare, compare_table, 1),
    "ratio_scores": (jm.plot.ratio_scores, ratio_table, 3),
    "rounding_loss": (jm.plot.rounding_loss, rounding_table, 1),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("names", [["stem"], STRANGE, [f"b{i}/x" for i in range(40)]])
def test_a_mark_for_every_row(kind: str, names: list[str]) -> None:
    draw, make, each = TABLES[kind]
    table = make(names)
    assert kind_of(table) == kind
    chart = draw(table, title="Mine")
    assert marks(chart) == each * len(names)
    stated = texts(chart)
    assert "Mine" in stated
    assert {name for name in names if name in stated} == set(names)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_another_kind_are_refused(kind: str) -> None:
    draw, make, _ = TABLES[kind]
    full = make(["stem"])
    with pytest.raises(ValueError, match=rf"jaxmet.plot.{kind}: the table has no rows"):
        draw(jm.Table({name: [] for name in full.columns}))
    missing = REPORTS[kind][-1]
    other = {k: v for k, v in full.columns.items() if k != missing}
    with pytest.raises(ValueError, match=f"no column {re.escape(repr(missing))}"):
        draw(jm.Table(other))
    with pytest.raises(ValueError, match="of type dict"):
        draw(full.columns)


@pytest.mark.parametrize(
    ("kind", "column", "lost"),
    [
        ("sensitivity", "only this", 1),
        ("noise", "share", 1),
        ("compare", "SQNR (dB)", 1),
        ("ratio_scores", "score", 1),
        ("rounding_loss", "ratio", 1),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None, np.float32("nan")])
def test_what_is_no_number_is_a_gap_and_said(
    kind: str, column: str, lost: int, bad: Any
) -> None:
    draw, make, each = TABLES[kind]
    table = make(["one", "two", "three"])
    table.columns[column][1] = bad
    chart = draw(table)
    assert drawn_rows(chart.to_dict()) == 3 * each - lost
    assert any("left out" in text for text in chart.to_dict()["title"]["subtitle"])
    json.dumps(chart.to_dict(), allow_nan=False)


def test_nothing_but_gaps_is_still_a_picture() -> None:
    table = sensitivity_table(["one"])
    table.columns["only this"] = table.columns["all but this"] = [math.nan] * len(table)
    chart = jm.plot.sensitivity(table)
    assert marks(chart) == 0 and "one" in texts(chart)


def test_sensitivity_draws_the_scores_and_the_two_lines() -> None:
    table = sensitivity_table(["stem", "head"])
    chart = jm.plot.sensitivity(table)
    found = {(r["name"], round(r["score"], 6)) for r in values_of(chart)}
    wanted = {
        (r["tensor"], round(r[c], 6))
        for r in table
        for c in ("only this", "all but this")
    }
    assert found == {w for w in wanted if w[0] != "(all)"}
    assert any("float 0.92" in t and "quantized 0.7" in t for t in texts(chart))


def test_losses_of_an_optimisation_are_lines() -> None:
    table = rounding_table(["stem", "head", "nearest"])
    alone = jm.plot.rounding_loss(table).to_dict()
    table.columns["curve"] = [[4.0, 2.0, 1.0], [8.0, 6.0, 6.0], None]
    chart = jm.plot.rounding_loss(table)
    points = values_of(chart, "curve")
    found = {(p["name"], round(p["done"], 3), p["part"]) for p in points}
    assert {("stem", 0.667, 2.0), ("stem", 1.0, 1.0), ("head", 1.0, 3.0)} <= found
    assert len(found) == 6 and drawn_rows(chart.to_dict()) == drawn_rows(alone) == 3


def test_turns_of_a_stacked_layer_have_a_row_each() -> None:
    table = rounding_table(["stem", "block", "block", "block"])
    table.columns["turn"] = [None, 0, 1, 2]
    rows = values_of(jm.plot.rounding_loss(table))
    assert [r["name"] for r in rows] == ["stem", "block[0]", "block[1]", "block[2]"]


def test_several_widths_stand_side_by_side() -> None:
    chart = jm.plot.sensitivity(sensitivity_table(["stem", "head"], bits=(4, 8)))
    assert marks(chart) == 8
    assert {"4 bits", "8 bits"} <= set(texts(chart))


def test_noise_bars_are_the_shares_in_the_order_of_the_table() -> None:
    names = ["z", "a", "m"]
    chart = jm.plot.noise(noise_table(names))
    rows = values_of(chart)
    assert [r["name"] for r in rows] == names
    np.testing.assert_allclose([r["share"] for r in rows], [1 / 6, 2 / 6, 3 / 6])
    shown = [t for t in texts(chart) if t in names]
    assert shown == names


def test_compare_marks_badly_used_grids() -> None:
    table = compare_table(["stem", "head"])
    plain = jm.plot.compare(table).to_json()
    table.columns["note"][1] = "too wide: 3 % of the levels used"
    assert "red" not in plain and "red: badly used quantizers (1)" in str(
        jm.plot.compare(table).to_dict()["title"]["subtitle"]
    )


def test_ratio_scores_draw_the_chosen_ratios() -> None:
    for names in (["a", "b"], [f"s{i}" for i in range(20)]):
        chart = jm.plot.ratio_scores(ratio_table(names), {names[1]: 0.5})
        rings = chart.to_dict()["layer"][-1]["data"]["name"]
        rows = chart.to_dict()["datasets"][rings]
        assert [(r["name"], r["ratio"]) for r in rows] == [(names[1], 0.5)]
    with pytest.raises(ValueError, match="no layer 'stem'"):
        jm.plot.ratio_scores(ratio_table(["a"]), {"stem": 0.5})


# Pareto


def test_the_front_is_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        for _ in range(20):
            points = [tuple(p) for p in rng.integers(0, 9, (size, 2)).tolist()]
            wanted = {
                i
                for i, (x, y) in enumerate(points)
                if not any(u <= x and v >= y and (u, v) != (x, y) for u, v in points)
            }
            found = front(points)
            assert set(found) == wanted and len(found) == len(wanted)
            assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_pareto_draws_all_points_and_joins_the_front() -> None:
    table = jm.Table(
        {
            "a.b": [1.0, 2.0, 3.0, math.nan],
            "é[0]": [1, 3, 2, 9],
            "n": ["p", "q", "r", "s"],
        }
    )
    chart = jm.plot.pareto(table, x="a.b", y="é[0]", label="n")
    assert marks(chart) == 3
    line = chart.to_dict()["layer"][0]["data"]["name"]
    assert [r["name"] for r in chart.to_dict()["datasets"][line]] == ["p", "q"]
    stated = texts(chart)
    assert {"p", "q", "r", "a.b", "é[0]"} <= set(stated) and "s" not in stated
    assert marks(jm.plot.pareto(table, x="a.b", y="é[0]")) == 3
    with pytest.raises(ValueError, match="no column 'c'"):
        jm.plot.pareto(table, x="c", y="é[0]")
    with pytest.raises(ValueError, match="'n' holds no number"):
        jm.plot.pareto(table, x="n", y="é[0]")


# Weights


def network(names: list[str]) -> tuple[Any, jm.Graph]:
    """Layers of 6 channels in a row, with these names."""
    rng = np.random.default_rng(1)
    params = {
        n: {"w": jax.device_put(np.float32(rng.normal(size=(6, 6)) * (1 + i)))}
        for i, n in enumerate(names)
    }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = jax.nn.relu(x @ params[name]["w"])
        return x

    return params, jm.trace(apply, params, jnp.ones((2, 6)))


@pytest.fixture(scope="module")
def strange() -> tuple[Any, jm.Graph]:
    return network(["a.b[0]", "größe", "it's", "c:d"])


def test_ranges_of_every_channel(strange: tuple[Any, jm.Graph]) -> None:
    params, graph = strange
    chart = jm.plot.weight_ranges(params, graph)
    assert marks(chart) == 4 * 6
    rows = values_of(chart)
    for layer in graph.layers:
        weight = np.asarray(params[layer.name]["w"])
        mine = [r for r in rows if r["layer"] == layer.name]
        np.testing.assert_allclose([r["low"] for r in mine], weight.min(0), rtol=1e-3)
        np.testing.assert_allclose([r["high"] for r in mine], weight.max(0), rtol=1e-3)
        third = np.quantile(weight, 0.75, axis=0)
        np.testing.assert_allclose([r["third"] for r in mine], third, rtol=1e-3)
    assert {n.name for n in graph.layers} <= set(texts(chart))


def test_ranges_before_and_after(strange: tuple[Any, jm.Graph]) -> None:
    params, graph = strange
    after = jax.tree.map(lambda w: 2 * w, params)
    chart = jm.plot.weight_ranges(params, graph, after=after)
    assert marks(chart) == 2 * 4 * 6
    rows = values_of(chart)
    low = {t: [r["low"] for r in rows if r["tree"] == t] for t in ("before", "after")}
    np.testing.assert_allclose(low["after"], 2 * np.array(low["before"]), rtol=1e-2)
    assert {"before", "after"} <= set(texts(chart))
    chart = jm.plot.relative_weight_ranges(params, graph, after=after)
    assert marks(chart) == 2 * 4


def test_neighbours_share_a_bar_where_channels_are_many() -> None:
    weight = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(3, 1000))))
    graph = jm.trace(lambda p, x: x @ p["w"], {"w": weight}, jnp.ones((1, 3)))
    rows = values_of(jm.plot.weight_ranges({"w": weight}, graph))
    assert len(rows) <= 72
    assert sum(r["width"] for r in rows) == 1000
    cuts = [(r["first"], r["first"] + r["width"]) for r in rows]
    np.testing.assert_allclose(
        [r["high"] for r in rows],
        [float(weight[:, a:b].max()) for a, b in cuts],
        rtol=1e-3,
    )


def test_compressed_leaves_are_drawn_as_what_they_stand_for(
    strange: tuple[Any, jm.Graph],
) -> None:
    params, graph = strange
    small = jm.factorize(params, graph, ratios=0.7, progress=False)
    plain = jm.densify(small)
    found, wanted = (weights_of(tree, graph, "test") for tree in (small, plain))
    assert list(found) == list(wanted)
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    stated = {
        r["name"]: r["done"] for r in values_of(jm.plot.graph(graph, params=small))
    }
    assert any("rank " in done for done in stated.values())


def test_pruned_channels_have_no_range(strange: tuple[Any, jm.Graph]) -> None:
    params, graph = strange
    rows = [jax.device_put(np.float32(np.random.default_rng(0).normal(size=(16, 6))))]
    small = jm.prune(params, graph, {"größe": 0.5}, batches=rows, progress=False)
    table = relative_table(small, graph)
    lost = dict(zip(table["layer"], table["without range"], strict=True))
    assert lost["a.b[0]"] == 3 and sum(lost.values()) == 3
    stated = {r["name"]: r for r in values_of(jm.plot.graph(graph, params=small))}
    assert "3 of 6 along axis 1" in stated["a.b[0]"]["done"]
    assert "3 of 6 along axis 0" in stated["größe"]["done"]
    assert stated["größe"]["state"] == "pruned or factorized"
    assert stated["c:d"]["state"] == "float"


def test_a_million_channels_are_quick() -> None:
    layers, channels = 100, 10_000
    rng = np.random.default_rng(0)
    weight = jax.device_put(np.float32(rng.normal(size=(4, channels))))
    params = {f"layer{i}": {"w": weight} for i in range(layers)}

    def apply(params: Any, x: jax.Array) -> list[jax.Array]:
        return [x @ leaf["w"] for leaf in params.values()]

    graph = jm.trace(apply, params, jnp.ones((1, 4)))
    for draw in (jm.plot.weight_ranges, jm.plot.relative_weight_ranges):
        start = time.perf_counter()
        spec = draw(params, graph).to_dict()
        assert time.perf_counter() - start < 5
        assert len(json.dumps(spec)) < 2e6
        assert drawn_rows(spec) == layers


def test_relative_ranges_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 3, 50):
        widths = rng.lognormal(size=size)
        widths[rng.random(size) < 0.2] = 0
        found = relative(widths)
        alive = sorted(w for w in widths if w > 0)
        assert found.dead == size - len(alive)
        wanted = [w / alive[0] for w in alive]
        np.testing.assert_allclose(np.sort(found.values), wanted)
        if wanted:
            q1, q3 = (np.percentile(wanted, p) for p in (25, 75))
            beyond = [w for w in wanted if w > q3 + 1.5 * (q3 - q1)]
            np.testing.assert_allclose(np.sort(found.outliers), beyond)
            assert found.largest == pytest.approx(max(wanted))
    assert relative(np.zeros(3)).dead == 3 and relative(np.zeros(3)).largest == 1
    assert relative(np.array([1.0, np.nan, np.inf, 2.0])).dead == 2
    order = {"a": relative(np.array([1.0, 2])), "b": relative(np.array([1.0, 9]))}
    assert worst_first(order) == ["b", "a"]


def test_a_damaged_layer_stands_first_and_is_flagged() -> None:
    params, graph = network(["one", "two", "three"])
    params["two"]["w"] = params["two"]["w"].at[:, 3].multiply(500.0)
    chart = jm.plot.relative_weight_ranges(params, graph)
    rows = values_of(chart)
    assert [r["state"] for r in rows] == ["problem layer", "no problem", "no problem"]
    assert rows[0]["name"] == "two" and rows[0]["outliers"] == 1
    widths = np.ptp(np.asarray(params["two"]["w"]), axis=0)
    assert rows[0]["largest"] == pytest.approx(widths.max() / widths.min(), rel=1e-3)
    assert any("1 problem layer of 3: two" in t for t in texts(chart))
    table = relative_table(params, graph)
    assert table["layer"][0] == "two" and table["problem"] == ["yes", None, None]
    assert table["largest"][0] == pytest.approx(widths.max() / widths.min(), rel=1e-3)
    dead = jax.tree.map(jnp.zeros_like, params)
    assert marks(jm.plot.relative_weight_ranges(dead, graph)) == 3


# Histograms


def bars_of(panel: Any) -> str:
    """The name of the data of a panel's bars."""
    return next(
        layer["data"]["name"]
        for layer in panel["layer"]
        if layer.get("name", "").startswith("rows")
    )


def test_one_value_far_out_is_seen() -> None:
    w = np.random.default_rng(0).normal(size=(400, 600)).astype(np.float32)
    params = {"w": jnp.asarray(w)}
    graph = jm.trace(lambda p, x: x @ p["w"], params, jnp.ones((1, 400)))
    far = {"w": params["w"].at[0, 0].set(40.0)}
    rows = values_of(jm.plot.histograms(far, graph))
    highest, last = max(r["drawn"] for r in rows), rows[-1]
    assert last["share"] == pytest.approx(1 / w.size, rel=1e-2)
    assert np.sqrt(last["drawn"] / highest) * 100 > 2  # pixels of a panel of 100
    assert any(r["share"] == 0 == r["drawn"] for r in rows)  # the gap stays one


def test_histograms_count_every_value_and_draw_the_grid() -> None:
    params, graph = network(["a.b[0]", "two"])
    rng = np.random.default_rng(0)
    images = jax.device_put(np.float32(rng.normal(size=(8, 6))))
    batches = [images[:4], images[4:]]
    config = jm.QuantConfig(4, 4, per_channel=False)
    quantizers = jm.calibrate(params, graph, batches, config, progress=False)
    chart = jm.plot.histograms(params, graph, quantizers, batches)
    panels = chart.to_dict()["concat"]
    heads = [p["title"]["text"] for p in panels]
    assert {"a.b[0]/w", "two/w", "input"} <= set(heads)
    for panel in panels:
        rows = chart.to_dict()["datasets"][bars_of(panel)]
        assert sum(r["share"] for r in rows) == pytest.approx(1, abs=1e-2)
        ticks = chart.to_dict()["datasets"][panel["layer"][-1]["data"]["name"]]
        assert len(ticks) == (15 if panel["title"]["text"].endswith("/w") else 16)
    [panel] = [p for p in panels if p["title"]["text"] == "input"]
    rows = chart.to_dict()["datasets"][bars_of(panel)]
    for row in rows:
        inside = np.mean((images >= row["from"] - 1e-3) & (images < row["to"] + 1e-3))
        assert inside >= row["share"] - 1e-3
    assert rows[0]["from"] <= float(images.min()) and rows[-1]["to"] >= float(
        images.max()
    )
    assert marks(chart) == sum(
        len(chart.to_dict()["datasets"][bars_of(p)]) for p in panels
    )


def test_what_a_grid_clips_is_red() -> None:
    params, graph = network(["one"])
    quantizers = jm.calibrate(params, graph, [jnp.ones((2, 6))], progress=False).pin(
        params
    )
    tight = quantizers.set("one/w", scale=jnp.full((1, 6), 1e-3))
    for q, clipped in ((quantizers, False), (tight, True)):
        rows = values_of(jm.plot.histograms(params, graph, q))
        assert any(r["kind"] == "clipped" for r in rows) == clipped
    with pytest.raises(ValueError, match="nothing is called 'tow'"):
        jm.plot.histograms(params, graph, names="tow")
    with pytest.raises(ValueError, match="histograms: quantizers is of type list"):
        jm.plot.histograms(params, graph, [jnp.ones((2, 6))])


# Graphs


def test_every_node_stands_below_what_it_reads() -> None:
    reads = {
        "x": [],
        "a": ["x"],
        "b": ["x"],
        "c": ["a", "b"],
        "d": ["c", "x"],
        "e": ["?"],
    }
    found = places(reads)
    assert len(set(found.values())) == len(reads)
    assert all(
        found[b].row < found[name].row
        for name in reads
        for b in reads[name]
        if b in found
    )
    assert (found["a"].row, found["b"].row) == (1, 1)


def test_lanes_do_not_overlap_or_touch() -> None:
    rng = np.random.default_rng(0)
    spans = [tuple(sorted(s)) for s in rng.integers(0, 20, (60, 2)).tolist()]
    spans = [(a, b + 1) for a, b in spans]
    found = lanes(spans)
    for i, (a, b) in enumerate(spans):
        for j, (c, d) in enumerate(spans[:i]):
            assert found[i] != found[j] or b < c or d < a


def test_the_graph_says_what_was_done(strange: tuple[Any, jm.Graph]) -> None:
    params, graph = strange
    config = jm.QuantConfig(4, 8)
    quantizers = jm.calibrate(params, graph, [jnp.ones((2, 6))], config, progress=False)
    chart = jm.plot.graph(graph, params=params, quantizers=quantizers)
    assert marks(chart) == len(graph.nodes)
    rows = {r["name"]: r for r in values_of(chart)}
    for layer in graph.layers:
        assert "weight 4 bits" in rows[layer.name]["done"]
        assert rows[layer.name]["state"] == "quantized weight"
    assert rows["input"]["state"] == "result on a grid"
    plain = {r["name"]: r for r in values_of(jm.plot.graph(graph))}
    assert {r["state"] for r in plain.values()} == {"float"}
    with pytest.raises(ValueError, match="of type dict"):
        jm.plot.graph({})
    other, of_other = network(["another"])
    with pytest.raises(ValueError, match="plot.graph: .*no parameter 'a.b"):
        jm.plot.graph(graph, params=other)
    with pytest.raises(
        ValueError, match="plot.graph: the quantizers have one for 'a.b"
    ):
        jm.plot.graph(of_other, quantizers=quantizers)
    with pytest.raises(ValueError, match="plot.graph: the parameters are traced"):
        jax.jit(lambda p: len(str(jm.plot.graph(graph, params=p))))(params)


def test_the_graph_of_a_pruned_network_with_batch_norms() -> None:
    apply, params, inputs = model("inverted_residual")
    graph = jm.trace(apply, params, *inputs)
    small = jm.prune(params, graph, ratios=0.5)
    other = jm.trace(apply, small, *inputs)
    rows = values_of(jm.plot.graph(other, params=small))
    assert len(rows) == len(other.nodes)
    assert any(r["state"] == "pruned or factorized" for r in rows)


def test_hundreds_of_nodes_keep_their_height() -> None:
    params, graph = network([f"layer{i}" for i in range(120)])
    start = time.perf_counter()
    spec = jm.plot.graph(graph, params=params).to_dict()
    assert time.perf_counter() - start < 5
    assert spec["height"] >= 20 * len(graph.nodes)


# Files


@pytest.mark.parametrize("suffix", ["html", "png", "svg", "json"])
def test_saved_in_every_form(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"noise.{suffix}"
    jm.plot.save(jm.plot.noise(noise_table(["stem"])), path)
    content = path.read_bytes()
    start = {
        "html": b"<!DOCTYPE html>",
        "png": b"\x89PNG",
        "svg": b"<svg",
        "json": b"{",
    }
    assert content.lstrip().startswith(start[suffix])
    if suffix == "html":
        assert not re.search(rb"""<(script|link)[^>]*(src|href)=["']https?:""", content)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    chart = jm.plot.noise(noise_table(["stem"]))
    with pytest.raises(ValueError, match="is a folder"):
        jm.plot.save(chart, tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        jm.plot.save(chart, tmp_path / "none" / "x.svg")
    with pytest.raises(ValueError, match="ends in '.pdf'"):
        jm.plot.save(chart, tmp_path / "x.pdf")
    with pytest.raises(ValueError, match="of type str"):
        jm.plot.save("chart", tmp_path / "x.svg")
    for scale in (0, -1, True, "2"):
        with pytest.raises(ValueError, match=r"plot.save: scale is .*Give pixels"):
            jm.plot.save(chart, tmp_path / "x.png", scale=scale)
    with pytest.raises(ValueError, match="plot.save: the path is 3"):
        jm.plot.save(chart, 3)
    assert not list(tmp_path.iterdir())


def test_without_altair_a_picture_says_how_to_get_it() -> None:
    code = """
import sys
sys.modules["altair"] = None
import jaxmet as jm
for draw in (lambda: jm.plot.noise(None), lambda: jm.plot.graph(None)):
    try:
        draw()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        f"jaxmet.plot.{name}: there is no package 'altair'. Install what it needs: pip install "
        "altair vl-convert-python."
        for name in ("noise", "graph")
    ], done.stderr


# What a hurried reader would be misled by


def test_a_grid_has_a_line_of_its_own_where_names_coincide() -> None:
    table = noise_table(["a", "b"])
    (last,) = noise_table(["a"]).where(tensor="a")
    other = jm.Table({k: [v] for k, v in (last | {"kind": "activation"}).items()})
    table = jm.Table.concat(table, other)
    names = [row["name"] for row in values_of(jm.plot.noise(table))]
    assert names == ["a (weight)", "b", "a (activation)"]


def test_long_names_keep_both_ends(strange: tuple[Any, jm.Graph]) -> None:
    names = [f"{'module/' * 12}layer_{i}/kernel" for i in range(3)]
    shown = [t for t in texts(jm.plot.noise(noise_table(names))) if "…" in t]
    assert len(set(shown)) == 3 and all(len(t) == 46 for t in shown)
    assert all(t.startswith("module/") and t.endswith("/kernel") for t in shown)


def test_weights_that_are_not_finite_are_named() -> None:
    apply, params, x = model("conv_bn_relu")
    graph = jm.trace(apply, params, *x)
    layer = next(n for n in graph.layers if n.weight is not None)
    bad = jax.tree_util.tree_map_with_path(
        lambda p, a: a.at[(0,) * a.ndim].set(jnp.inf) if a.ndim == 4 else a, params
    )
    for draw in (
        jm.plot.weight_ranges,
        jm.plot.relative_weight_ranges,
        jm.plot.histograms,
    ):
        assert not any("NaN or infinity" in t for t in texts(draw(params, graph)))
        assert any(
            "NaN or infinity" in t and layer.name in t for t in texts(draw(bad, graph))
        )
    for draw in (jm.plot.weight_ranges, jm.plot.relative_weight_ranges):
        for chart in (
            draw(bad, graph, after=params),
            draw(params, graph, after=bad),
        ):
            assert any("NaN or infinity" in t and layer.name in t for t in texts(chart))


def test_a_single_weight_a_channel_has_a_range_with_zero() -> None:
    params = {"a": jnp.array([[0.001, 0.01, 1.0, 10.0, 0.02]]), "b": jnp.ones((5, 2))}
    graph = jm.trace(lambda p, x: (x @ p["a"]) @ p["b"], params, jnp.ones((3, 1)))
    chart = jm.plot.relative_weight_ranges(params, graph.only("a"))
    (row,) = values_of(chart)
    assert row["largest"] == 1e4 and row["dead"] == 0


def test_a_tree_of_another_model_is_no_after(strange: tuple[Any, jm.Graph]) -> None:
    params, graph = strange
    wider = jax.tree.map(lambda a: jnp.concatenate([a, a]), params)
    for draw in (jm.plot.weight_ranges, jm.plot.relative_weight_ranges):
        with pytest.raises(ValueError, match="of the same model"):
            draw(params, graph, after=wider)


def test_the_graph_of_a_compressed_tree_says_so_before_and_after_a_trace() -> None:
    apply, params, x = model("conv_bn_relu")
    graph = jm.trace(apply, params, *x)
    small = jm.factorize(params, graph, ratios=0.7, method="weight")
    again = jm.trace(apply, small, *x)
    pruned = jm.prune(small, again, 0.6)
    third = jm.trace(apply, pruned, *x)
    for tree, of in ((small, graph), (small, again), (pruned, graph), (pruned, third)):
        rows = values_of(jm.plot.graph(of, params=tree))
        stated = " ".join(r["done"] for r in rows)
        assert "rank" in stated and any(r["state"].startswith("pruned") for r in rows)
        assert ("along axis" in stated) is (tree is pruned)


def test_only_the_front_is_written_beside_its_points() -> None:
    rows = [(float(i), float(-abs(i - 3)), f"row {i}") for i in range(20)]
    table = table_of(("cost", "worth", "name"), rows)
    found = texts(jm.plot.pareto(table, x="cost", y="worth", label="name"))
    assert [t for t in found if t.startswith("row ")] == [f"row {i}" for i in range(4)]
