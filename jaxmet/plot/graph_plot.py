"""The model from top to bottom, and what was done to each of its nodes."""

from collections.abc import Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph, check_graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.matching import check_quantizers
from jaxmet.plot.channel_ranges import leaves_of_layers
from jaxmet.plot.drawing import ROWS, altair, data, layered, shortened, titled
from jaxmet.plot.node_positions import NodePosition, lanes, places
from jaxmet.plot.states import STATES, states_of
from jaxmet.tree.quantizers import Quantizers

CALLER = "plot.graph"
ROW, COLUMN, LANE = 34, 330, 14  # pixels
BOX, TALL = 300, 26


def graph(
    graph: Any,
    *,
    params: Any = None,
    quantizers: Quantizers | None = None,
    title: str | None = None,
) -> Any:
    """The nodes of a model as boxes from top to bottom, with an edge for all that is read.

    The second line of a box says what the node is and what was done to it: the bits of its
    weight and of its result, the channels that it shares with others (and that `jm.equalize`
    rescales together), norms that are folded, and, with `params`, what is pruned, factorized
    or bounded channel by channel. The colour says it at a glance. Edges that pass rows by run
    in lanes at the side.

    Args:
        graph: the graph of `jm.trace`.
        params: a tree of this model, for what was compressed; default None.
        quantizers: for bit-widths; default None.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for what is no graph, and for a tree or quantizers of another one.

    >>> jm.plot.graph(graph, params=params, quantizers=quantizers)
    """
    alt = altair(CALLER)
    check_graph(graph, CALLER, "Give what jm.trace returned.")
    if params is not None:
        graph = graph.of(params, CALLER)
        leaves_of_layers(params, graph, CALLER)
    if quantizers is not None:
        check_quantizers(quantizers, graph, CALLER, params)
    states = states_of(graph, params, quantizers)
    where = places({n.name: _reads(n) for n in graph.nodes})
    boxes = [_box(n, where[n.name], states[n.name]) for n in graph.nodes]
    edges, beside = _edges(graph, where)
    rows = 1 + max(p.row for p in where.values())
    columns = 1 + max(p.column for p in where.values())
    width = columns * COLUMN - (COLUMN - BOX) + LANE * (beside + 1)
    across = alt.Scale(domain=[0, width], nice=False)
    down = alt.Scale(domain=[rows * ROW, 0], nice=False)
    x, y = _pixels(alt.X, across, "left"), _pixels(alt.Y, down, "top")
    lines = (
        alt.Chart(data(alt, edges))
        .mark_line(color="#98a1ad", strokeWidth=1, strokeJoin="round")
        .encode(x=x, y=y, detail="edge:N", order="place:Q")
    )
    every = data(alt, boxes)
    shown = [k for k in STATES if any(b["state"] == k for b in boxes)]
    color = alt.Color(
        "state:N",
        scale=alt.Scale(domain=shown, range=[STATES[k] for k in shown]),
        legend=alt.Legend(title=None, orient="top", columns=3, labelLimit=300),
    )
    tip = ["name:N", "what:N", "done:N", "channels:N", "state:N"]
    rects = (
        alt.Chart(every, name=ROWS)
        .mark_rect(cornerRadius=3, stroke="#5b6470", strokeWidth=0.6)
        .encode(x=x, x2="right:Q", y=y, y2="bottom:Q", color=color, tooltip=tip)
    )
    text = alt.Chart(every).mark_text(
        align="left", baseline="middle", dx=6, limit=BOX - 12
    )
    upper = text.encode(x=x, y=_pixels(alt.Y, down, "upper"), text="label:N")
    lower = text.mark_text(
        align="left",
        baseline="middle",
        dx=6,
        fontSize=9,
        color="#3d4650",
        limit=BOX - 12,
    ).encode(x=x, y=_pixels(alt.Y, down, "lower"), text="done:N")
    chart = layered(alt, [lines, rects, upper, lower]).properties(
        width=width, height=rows * ROW, view=alt.ViewBackground(stroke=None)
    )
    subtitle = f"{len(graph.nodes)} nodes, {len(graph.layers)} selected layers"
    return titled(alt, chart, title or "The model", subtitle)


def _pixels(channel: Any, scale: Any, field: str) -> Any:
    return channel(f"{field}:Q", scale=scale, axis=None)


def _reads(node: Node) -> list[str]:
    return [e.node for e in node.inputs if e.node is not None]


def _box(node: Node, place: NodePosition, state: Mapping[str, Any]) -> dict[str, Any]:
    left, top = place.column * COLUMN, place.row * ROW
    return {
        "name": node.name,
        "label": shortened(node.name, 44),
        "left": left,
        "right": left + BOX,
        "top": top,
        "bottom": top + TALL,
        "upper": top + 8,
        "lower": top + 19,
        **state,
    }


def _edges(
    graph: Graph, where: Mapping[str, NodePosition]
) -> tuple[list[dict[str, Any]], int]:
    """The corners of all edges, and how many lanes those beside the nodes take."""
    pairs = [
        (where[name], where[node.name])
        for node in graph.nodes
        for name in dict.fromkeys(_reads(node))
        if name in where
    ]
    far = [p for p in pairs if p[1].row - p[0].row > 1 or p[0].row >= p[1].row]
    lane = dict(
        zip(range(len(far)), lanes([(a.row, b.row) for a, b in far]), strict=True)
    )
    right = (1 + max(p.column for p in where.values())) * COLUMN - (COLUMN - BOX)
    records = []
    number = 0
    for i, (a, b) in enumerate(pairs):
        x1, y1 = a.column * COLUMN + BOX / 2, a.row * ROW + TALL
        x2, y2 = b.column * COLUMN + BOX / 2, b.row * ROW
        corners = [(x1, y1), (x2, y2)]
        if (a, b) in far:
            x = right + LANE * (1 + lane[number])
            number += 1
            y1, y2 = a.row * ROW + TALL / 2, b.row * ROW + TALL / 2
            corners = [
                (a.column * COLUMN + BOX, y1), (x, y1), (x, y2),
                (b.column * COLUMN + BOX, y2),
            ]  # fmt: skip
        records += [
            {"edge": i, "place": j, "left": x, "top": y}
            for j, (x, y) in enumerate(corners)
        ]
    return records, 1 + max(lane.values(), default=-1)
