"""How uneven the ranges of a layer's channels are: which layers one scale serves badly."""

from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.plot.channel_ranges import (
    Relative,
    not_finite,
    ranges,
    relative,
    same_model,
    weights_of,
    worst_first,
)
from jaxmet.plot.drawing import (
    AFTER,
    BAD,
    BEFORE,
    ROWS,
    WIDTH,
    altair,
    data,
    height,
    layered,
    log_axis,
    names_axis,
    titled,
)
from jaxmet.tree.table import Table

CALLER = "plot.relative_weight_ranges"
UNEVEN = 4  # the median channel then has two bits less than the grid
SHOWN = 24  # outliers per layer
PROBLEM, FINE, OLD = "problem layer", "no problem", "before"


def relative_weight_ranges(
    params: Any, graph: Graph, *, after: Any = None, title: str | None = None
) -> Any:
    """Each output channel's range over the smallest one of its layer; worst layer first.

    One line per layer on a logarithmic scale: from 1 to the largest ratio, the box is the middle
    half of the channels, the white tick the median, points are the outliers beyond
    Q3 + 1.5 (Q3 − Q1), AIMET's rule (the largest 24). A problem layer is red: it has
    outliers, and its largest range is four times that of its median channel or more, so that
    with one scale for the whole tensor most channels lose two bits. Channels without any range
    are left out and counted in the tooltip. With `after`, another tree of the same model,
    its lines are the coloured ones and those from before stand above them in grey.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        after: another tree of this model, drawn beside; default None.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a tree that is not the graph's.

    >>> jm.plot.relative_weight_ranges(params, graph, after=jm.equalize(params, graph))
    """
    alt = altair(CALLER)
    weights, found = _relative(params, graph)
    gone = not_finite(weights)
    order = worst_first(found)
    trees = {"before": found} if after is None else {"before": found}
    if after is not None:
        changed, trees["after"] = _relative(after, graph)
        same_model(weights, changed, CALLER)
        gone = not_finite(weights, changed)
    newest = [*trees][-1]
    records, points = [], []
    for tree, each in trees.items():
        for name in order:
            row = _record(each[name]) | {"name": name, "tree": tree}
            if tree != newest:
                row["state"] = OLD
            records.append(row)
            largest = sorted(each[name].outliers, reverse=True)[:SHOWN]
            points += [row | {"ratio": float(v)} for v in largest]
    bad = {
        tree: [n for n in order if is_problem(each[n])] for tree, each in trees.items()
    }
    chart = _chart(alt, records, points, order, len(trees))
    heading = title or "Ranges of channels over the smallest of their layer"
    return titled(alt, chart, heading, _problems(bad, len(order)), gone)


def relative_table(params: Any, graph: Graph, *, after: Any = None) -> Table:
    """The numbers of `relative_weight_ranges`: one row per layer and tree, worst first."""
    trees = {"before": _relative(params, graph)[1]}
    if after is not None:
        trees["after"] = _relative(after, graph)[1]
    rows = [
        {
            "layer": name,
            "tree": tree,
            "channels": len(each[name].values) + each[name].dead,
            "median": float(each[name].quartiles[2]),
            "largest": each[name].largest,
            "outliers": len(each[name].outliers),
            "without range": each[name].dead,
            "problem": "yes" if is_problem(each[name]) else None,
        }
        for name in worst_first(trees["before"])
        for tree, each in trees.items()
    ]
    columns = {k: [row[k] for row in rows] for k in rows[0]}
    if after is None:
        del columns["tree"]
    return Table(columns, title="ranges of channels over the smallest of their layer")


def _problems(bad: dict[str, list[str]], layers: int) -> str:
    """How many layers are flagged, and the worst of them."""
    if len(bad) > 1:
        counts = ", ".join(f"{len(names)} {tree}" for tree, names in bad.items())
        return f"problem layers of {layers}: {counts}"
    [names] = bad.values()
    worst = (
        f": {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""
    )
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} problem layer{plural} of {layers}{worst}"


def _relative(params: Any, graph: Graph) -> tuple[dict[str, Any], dict[str, Relative]]:
    weights = weights_of(params, graph, CALLER)
    found = {name: ranges(w) for name, w in weights.items()}
    return weights, {name: relative(r.high - r.low) for name, r in found.items()}


def is_problem(found: Relative) -> bool:
    """Whether few channels take so much of a common grid that the others lose bits."""
    return bool(found.outliers.size) and found.uneven >= UNEVEN


def _record(found: Relative) -> dict[str, Any]:
    values = [float(f"{v:.4g}") for v in found.quartiles]
    names = ("least", "first", "median", "third", "largest")
    return {
        **dict(zip(names, values, strict=True)),
        "outliers": len(found.outliers),
        "dead": found.dead,
        "channels": len(found.values) + found.dead,
        "state": PROBLEM if is_problem(found) else FINE,
        "note": f"{len(found.outliers)} outliers, up to {_times(found.largest)}",
    }


def _times(ratio: float) -> str:
    return f"{ratio:.3g}×" if ratio < 100 else f"{ratio:,.0f}×"


def _chart(alt: Any, records: Any, points: Any, order: list[str], trees: int) -> Any:
    states = {PROBLEM: BAD, FINE: AFTER} | ({OLD: BEFORE} if trees > 1 else {})
    tip = [
        *("name:N", "tree:N", "channels:Q", "outliers:Q", "dead:Q"),
        *(alt.Tooltip(f"{n}:Q", format=".3g") for n in ("median", "third", "largest")),
    ]
    base: dict[str, Any] = {"y": names_axis(alt, order), "tooltip": tip}
    if trees > 1:
        base["yOffset"] = alt.YOffset(
            "tree:N", scale=alt.Scale(domain=["before", "after"])
        )
    color = alt.Color(
        "state:N",
        scale=alt.Scale(domain=list(states), range=list(states.values())),
        legend=alt.Legend(title=None, orient="top"),
    )
    top = max([r["largest"] for r in records], default=1.0)
    end = max(top * 3, 2)  # room for what is written after the largest
    scale = alt.Scale(type="log", domain=[1, end], nice=False)
    heading = "range / smallest range of the layer"
    every = data(alt, records)
    text = [r for r in records if r["state"] == PROBLEM]
    x = alt.X("least:Q", scale=scale, axis=log_axis(alt, 1, end, title=heading))
    layers = [
        alt.Chart(every, name=ROWS)
        .mark_rule()
        .encode(**base, color=color, x=x, x2="largest:Q"),
        alt.Chart(every)
        .mark_bar(height={"band": 0.7})
        .encode(**base, color=color, x=alt.X("first:Q", scale=scale), x2="third:Q"),
        alt.Chart(every)
        .mark_tick(color="white", thickness=2, height=8)
        .encode(**base, x=alt.X("median:Q", scale=scale)),
        alt.Chart(data(alt, points))
        .mark_point(filled=True, size=16, opacity=0.8)
        .encode(**base, color=color, x=alt.X("ratio:Q", scale=scale)),
        alt.Chart(data(alt, text))
        .mark_text(align="left", dx=6, fontSize=9, color=BAD)
        .encode(**base, x=alt.X("largest:Q", scale=scale), text="note:N"),
    ]
    step = 16 if trees == 1 else 24
    return layered(alt, layers).properties(width=WIDTH, height=height(order, step))
