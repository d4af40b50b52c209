"""The range of every output channel of the weights, of one tree or before and after."""

from typing import Any

import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.plot.channel_ranges import (
    not_finite,
    quartiles,
    ranges,
    same_model,
    weights_of,
)
from jaxmet.plot.drawing import (
    AFTER,
    BEFORE,
    ROWS,
    WIDTH,
    altair,
    colours,
    data,
    height,
    names_axis,
    shown,
    titled,
)

CALLER = "plot.weight_ranges"
PANELS = 24  # more layers are one line each
BARS = 72  # more channels are drawn together with their neighbours
COLUMNS = 3


def weight_ranges(
    params: Any, graph: Graph, *, after: Any = None, title: str | None = None
) -> Any:
    """The range of every output channel of every layer, from `params` and `after` it.

    Up to 24 layers are panels: one bar per channel from its smallest to its largest weight, the
    middle half of its weights darker; of many channels neighbours are drawn as one bar. More
    layers are one line each: from the smallest weight of all to the largest, and as boxes where
    the middle half of the channels have their smallest and their largest weight. A short box
    far inside of the line's end: few channels have a range that all others pay for. `after`,
    another tree of the same model, stands beside in a second colour.

    Compressed leaves are drawn as the weight that they stand for.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        after: another tree of this model, drawn beside; default None.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a tree that is not the graph's.

    >>> jm.plot.weight_ranges(params, graph, after=jm.equalize(params, graph))
    """
    alt = altair(CALLER)
    trees = {"before": params} if after is None else {"before": params, "after": after}
    found = {k: weights_of(tree, graph, CALLER) for k, tree in trees.items()}
    layers = list(found["before"])
    if after is not None:
        same_model(found["before"], found["after"], CALLER)
    draw = _panels if len(layers) <= PANELS else _lines
    chart = draw(alt, found, layers)
    heading = title or "Ranges of the output channels of weights"
    return titled(
        alt, chart, heading, f"{len(layers)} layers", not_finite(*found.values())
    )


def _colour(alt: Any, found: Any) -> Any:
    if len(found) == 1:
        return alt.value(AFTER)
    return colours(alt, {"before": BEFORE, "after": AFTER}, "tree")


def _panels(alt: Any, found: Any, layers: list[str]) -> Any:
    records = []
    for number, (tree, weights) in enumerate(found.items()):
        share = 0.9 / len(found)
        for name in layers:
            for bar in bars_of(weights[name]):
                left = bar["first"] + number * share
                right = left + share * bar["width"]
                if len(found) > 1:
                    left = bar["first"] + number * share * bar["width"]
                    right = left + share * bar["width"]
                records.append(
                    bar | {"layer": name, "tree": tree, "left": left, "right": right}
                )
    tip = ["layer:N", "tree:N", "channels:N", *("low:Q", "high:Q")]
    x = alt.X(
        "left:Q",
        axis=alt.Axis(title=None, tickCount=4, grid=False),
        scale=alt.Scale(nice=False, zero=True),
    )
    base = {"x": x, "x2": "right:Q", "color": _colour(alt, found), "tooltip": tip}
    y = alt.Y(
        "low:Q", title=None, axis=alt.Axis(tickCount=4, minExtent=30, maxExtent=30)
    )
    drawn = [
        alt.Chart(name=ROWS).mark_rect(opacity=0.55).encode(**base, y=y, y2="high:Q"),
        alt.Chart()
        .mark_rect()
        .encode(**base, y=alt.Y("first_quartile:Q"), y2="third:Q"),
    ]
    width = 230
    header = alt.Header(
        title=None, labelAnchor="start", labelFontWeight="bold", labelExpr=shown(34)
    )
    facet = alt.Facet("layer:N", sort=layers, header=header)
    return (
        alt.layer(*drawn, data=data(alt, records))
        .properties(width=width, height=90)
        .facet(facet, columns=COLUMNS, spacing=14)
        .resolve_scale(x="independent", y="independent")
    )


def bars_of(weight: np.ndarray) -> list[dict[str, Any]]:
    """At most `BARS` bars for the channels of a weight, neighbours drawn together."""
    low, high = ranges(weight)
    first, third = quartiles(weight)
    step = -(-len(low) // BARS)
    starts = np.arange(0, len(low), step)
    widths = np.diff(np.append(starts, len(low)))
    columns = (
        np.fmin.reduceat(low, starts),  # passes NaN over where there are numbers
        np.fmax.reduceat(high, starts),
        np.add.reduceat(first, starts) / widths,
        np.add.reduceat(third, starts) / widths,
    )
    return [
        {
            "first": int(a),
            "width": int(n),
            "channels": f"{a}" if n == 1 else f"{a} to {a + n - 1}",
            "low": _short(v[0]),
            "high": _short(v[1]),
            "first_quartile": _short(v[2]),
            "third": _short(v[3]),
        }
        for a, n, v in zip(starts, widths, zip(*columns, strict=True), strict=True)
    ]


def _short(value: Any) -> float:
    """Four digits: a picture has no more, and they make most of its size."""
    return float(f"{float(value):.4g}")


def _lines(alt: Any, found: Any, layers: list[str]) -> Any:
    records = [
        {"name": name, "tree": tree, **_line(weights[name])}
        for tree, weights in found.items()
        for name in layers
    ]
    tip = [*("name:N", "tree:N", "channels:Q"), *("low:Q", "high:Q")]
    y = names_axis(alt, layers)
    base: dict[str, Any] = {"y": y, "color": _colour(alt, found), "tooltip": tip}
    if len(found) > 1:
        base["yOffset"] = alt.YOffset(
            "tree:N", scale=alt.Scale(domain=["before", "after"])
        )
    every = data(alt, records)
    x = alt.X("low:Q", title="weight")
    drawn = [alt.Chart(every, name=ROWS).mark_rule().encode(**base, x=x, x2="high:Q")]
    for one, two in (("low25:Q", "low75:Q"), ("high25:Q", "high75:Q")):
        box = alt.Chart(every).mark_bar(height={"band": 0.75})
        drawn.append(box.encode(**base, x=alt.X(one), x2=two))
    return alt.layer(*drawn).properties(
        width=WIDTH, height=height(layers, 15 if len(found) == 1 else 22)
    )


def _line(weight: np.ndarray) -> dict[str, Any]:
    low, high = ranges(weight)
    there = np.isfinite(low)
    low, high = (v[there] if there.any() else v[:1] for v in (low, high))
    lows, highs = (np.quantile(v, (0.25, 0.75)) for v in (low, high))
    return {
        "channels": len(weight),
        "low": _short(low.min()),
        "high": _short(high.max()),
        "low25": _short(lows[0]),
        "low75": _short(lows[1]),
        "high25": _short(highs[0]),
        "high75": _short(highs[1]),
    }
