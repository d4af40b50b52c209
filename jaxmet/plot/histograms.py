"""Histograms of weights and activations, with their quantizers."""

from typing import Any

import numpy as np

from jaxmet.engine.graph.graph import Graph, graph_of
from jaxmet.layers.matching import check_quantizers
from jaxmet.plot.channel_ranges import not_finite, weights_of
from jaxmet.plot.counts import Counts, activations, countable
from jaxmet.plot.drawing import (
    BAD,
    KINDS,
    ROWS,
    altair,
    colours,
    data,
    shortened,
    titled,
)
from jaxmet.tree.batches import as_batches
from jaxmet.tree.globs import select
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers

CALLER = "plot.histograms"
BINS = 60
SEEN = 1e-3  # of the highest bar: about three pixels
LEVELS = 32  # of more one would see no gaps
COLUMNS = 3
CLIPPED = "clipped"


def histograms(
    params: Any,
    graph: Graph,
    quantizers: Quantizers | None = None,
    batches: Any = None,
    *,
    names: Any = "*",
    title: str | None = None,
) -> Any:
    """Histograms of the weights, with `batches` of activations too, and their quantizers.

    A panel a weight (by the name of its parameter) or activation (by its node's): the share
    of values in each of 60 bins, on a scale of square roots and never less than a few pixels,
    so that tails are seen. With `quantizers` the grid is drawn in: below the bars a tick for
    each level where there are 32 or fewer, otherwise its ends; what lies beyond them is red,
    and the heading has the step and the share that is clipped. Where channels have grids of
    their own the ends are those of the widest. With quantizers only activations that have a
    quantizer are drawn. `names` is a glob, or several, over parameters and nodes.

    One pass over the batches counts up to 65,536 values of each node and batch. Nodes in
    branches and `while_loop`s are left out.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: quantizers to draw in; default None: values alone.
        batches: data for activations, as for `jm.calibrate`; default None: weights alone.
        names: a glob, or several, over parameters and nodes; default '*', all.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for names that mean nothing.

    >>> jm.plot.histograms(params, graph, quantizers, batches, names="block1/*")
    """
    alt = altair(CALLER)
    graph = graph_of(params, graph, CALLER)
    weights = _weights(params, graph)
    if quantizers is not None:
        check_quantizers(quantizers, graph, CALLER, params)
    nodes = [] if batches is None else _nodes(graph, quantizers)
    chosen = set(select(names, [*weights, *nodes], caller=CALLER))
    if not chosen:
        raise ValueError(
            f"jaxmet.{CALLER}: names is empty. Give globs, or leave it out."
        )
    panels = []
    for name, weight in weights.items():
        if name in chosen:
            q = None if quantizers is None else quantizers.weights.get(name)
            panels.append((name, "weight", _counted(weight), _grid(q, weight)))
    wanted = [n for n in nodes if n in chosen]
    if wanted:
        read = as_batches(batches, CALLER)
        seen = activations(params, graph, read, wanted, CALLER)
        for name in wanted:
            if name in seen:
                q = None if quantizers is None else quantizers.activation(name)
                panels.append(
                    (name, "activation", _coarse(*seen[name]), _grid(q, None))
                )
    charts = [_panel(alt, i, *panel) for i, panel in enumerate(panels)]
    chart = alt.concat(*charts, columns=COLUMNS, spacing=18)
    gone = not_finite({n: w for n, w in weights.items() if n in chosen})
    return titled(alt, chart, title or "Values and quantizers", gone)


def _weights(params: Any, graph: Graph) -> dict[str, np.ndarray]:
    """The weights by parameter name, as `(channels, values)`."""
    found = weights_of(params, graph, CALLER)
    return {graph[name].kernel: weight for name, weight in found.items()}


def _nodes(graph: Graph, quantizers: Quantizers | None) -> list[str]:
    every = [n.name for n in graph.nodes if countable(n) and n.name in graph.selected]
    if quantizers is None:
        return every
    return [n for n in every if quantizers.activation(n) is not None]


def _counted(weight: np.ndarray) -> Counts:
    finite = weight[np.isfinite(weight)]
    counts, edges = np.histogram(finite, BINS)
    return counts.astype(np.float64), edges


def _coarse(counts: np.ndarray, edges: np.ndarray) -> Counts:
    """At most `BINS` bins of neighbours, without the empty ones at the ends."""
    there = np.flatnonzero(counts)
    if not there.size:
        return counts[:1], edges[:2]
    first, last = there[0], there[-1] + 1
    step = -(-(last - first) // BINS)
    starts = np.arange(first, last, step)
    inner = counts[:last]
    return np.add.reduceat(inner, starts), np.append(edges[starts], edges[last])


def _grid(q: Quantizer | None, weight: Any) -> dict[str, Any] | None:
    """Ends, levels and step of a grid; of several the widest ends, and the smallest step."""
    if q is None or not q.active or q.product is not None:
        return None
    if q.follows and weight is None:
        return {"bits": q.bits, "ends": None, "levels": [], "step": "on the fly"}
    x = None
    if q.follows:  # channels first, whatever its axes were
        apart = q.axis is not None or q.block is not None
        x = weight if apart else weight.reshape(1, -1)
        q = q.set(axis=(0,), block=None, block_axis=None)
    scale, zero = (np.asarray(v, np.float64) for v in q.grid(x))
    low, high = q.ends
    ends = float((scale * (low - zero)).min()), float((scale * (high - zero)).max())
    few = high - low < LEVELS and scale.size == 1
    levels = (
        (np.arange(low, high + 1) - zero.reshape(())) * scale.reshape(()) if few else []
    )
    steps = sorted({f"{scale.min():.2g}", f"{scale.max():.2g}"})
    return {
        "bits": q.bits,
        "ends": ends,
        "levels": [float(v) for v in levels],
        "step": "step " + " … ".join(steps),
    }


def _panel(
    alt: Any, i: int, name: str, kind: str, counted: Counts, grid: dict[str, Any] | None
) -> Any:
    counts, edges = counted
    share = counts / max(counts.sum(), 1.0)
    drawn = np.where(counts > 0, np.maximum(share, SEEN * share.max()), 0.0)
    ends = grid["ends"] if grid else None
    center = (edges[:-1] + edges[1:]) / 2
    step = (edges[1:] - edges[:-1]).max()
    out = np.zeros(len(center), bool)
    if ends is not None:
        # Half a bin: the bin of an end lies on both of its sides.
        out = (center < ends[0] - step / 2) | (center > ends[1] + step / 2)
    records = [
        {
            "from": float(f"{edges[j]:.4g}"),
            "to": float(f"{edges[j + 1]:.4g}"),
            "share": float(f"{share[j]:.4g}"),
            "drawn": float(f"{drawn[j]:.4g}"),
            "none": 0.0,
            "kind": CLIPPED if out[j] else kind,
        }
        for j in range(len(share))
    ]
    x = alt.X(
        "from:Q", axis=alt.Axis(title=None, tickCount=5), scale=alt.Scale(zero=False)
    )
    y = alt.Y(
        "drawn:Q",
        scale=alt.Scale(type="sqrt"),
        axis=alt.Axis(title=None, format="~p", tickCount=3),
    )
    bars = (
        alt.Chart(data(alt, records), name=f"{ROWS}_{i}")
        .mark_rect()
        .encode(
            x=x,
            x2="to:Q",
            y=y,
            y2="none:Q",
            color=colours(alt, KINDS | {CLIPPED: BAD}),
            tooltip=["from:Q", "to:Q", alt.Tooltip("share:Q", format=".2%")],
        )
    )
    layers = [bars]
    if ends is not None:  # behind the bars, or one that is thin would be hidden
        marks = [{"from": v} for v in ends]
        rules = alt.Chart(data(alt, marks)).mark_rule(strokeDash=[3, 2], color="#333")
        layers = [rules.encode(x=x), bars]
    if grid is not None and grid["levels"]:
        ticks = alt.Chart(data(alt, [{"from": v} for v in grid["levels"]]))
        layers.append(
            ticks.mark_tick(color="#333", thickness=1, height=7).encode(
                x="from:Q", y=alt.value(96)
            )
        )
    heading = alt.TitleParams(
        shortened(name, 34),
        subtitle=_said(grid, float(share[out].sum())),
        anchor="start",
        fontSize=11,
    )
    return alt.layer(*layers).properties(width=225, height=100, title=heading)


def _said(grid: dict[str, Any] | None, clipped: float) -> str:
    if grid is None:
        return "no quantizer"
    lost = f", {100 * clipped:.2g} % clipped" if clipped else ""
    return f"{grid['bits']} bits, {grid['step']}{lost}"
