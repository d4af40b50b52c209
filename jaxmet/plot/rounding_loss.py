"""What choosing the rounding won, layer by layer."""

from typing import Any

from jaxmet.plot.drawing import (
    AFTER,
    BEFORE,
    ROWS,
    altair,
    colours,
    data,
    height,
    layered,
    left_out,
    log_axis,
    names_axis,
    no_names,
    titled,
)
from jaxmet.plot.tables import checked, number

SERIES = {"to nearest": BEFORE, "chosen": AFTER, "inherited": "#8e6bb0"}
COLUMNS = {"to nearest": "nearest loss", "chosen": "loss", "inherited": "inherited"}


def rounding_loss(table: Any, *, title: str | None = None) -> Any:
    """The report of `jm.adaround` as a chart: losses along the network, and their ratio.

    To the left, by layer and on a logarithmic scale, the loss of rounding to nearest, that of
    the chosen rounding, and what earlier layers left (no rounding of this layer takes it
    away). To the right what is left of the loss of nearest rounding, the inherited part taken
    from both. Under both, where the table has a `curve` (methods 'adam' and 'gram'), the loss
    of the soft rounding while it was optimised, over that of rounding to nearest: it rises
    towards the end, as the weights are drawn to the grid. Layers that were not rounded have no
    numbers: they are left out and named.

    Args:
        table: the report of `jm.adaround`.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a table that is empty or another's.

    >>> _, _, table = jm.adaround(params, graph, quantizers, batches, key=key, with_report=True)
    >>> jm.plot.rounding_loss(table)
    """
    alt, table = altair("plot.rounding_loss"), checked(table, "rounding_loss")
    rows = list(table)
    names = [_name(row) for row in rows]
    points = [
        {"place": i, "name": _name(row), "series": s, "loss": number(row[c])}
        for i, row in enumerate(rows)
        for s, c in COLUMNS.items()
    ]
    points = [p for p in points if p["loss"] is not None and p["loss"] > 0]
    bars = [
        {
            "name": _name(row),
            "ratio": number(row["ratio"]),
            "note": row.get("note"),
        }
        for row in rows
    ]
    curves = {
        "x": _loss(alt, [p["loss"] for p in points]),
        "y": names_axis(alt, names),
        "color": colours(alt, SERIES, "series"),
        "tooltip": ["name:N", "series:N", alt.Tooltip("loss:Q", format=".3g")],
    }
    every = data(alt, points)
    left = layered(
        alt,
        [
            alt.Chart(every)
            .mark_line(strokeWidth=1.3)
            .encode(**curves, order="place:Q"),
            alt.Chart(every).mark_point(filled=True, size=30).encode(**curves),
        ],
    ).properties(width=320, height=height(names))
    drawn = [b for b in bars if b["ratio"] is not None]
    right = (
        alt.Chart(data(alt, drawn), name=ROWS)
        .mark_bar(height={"band": 0.7}, color=AFTER)
        .encode(
            x=alt.X("ratio:Q", title="loss / nearest", axis=alt.Axis(tickCount=4)),
            y=no_names(alt, names),
            tooltip=["name:N", alt.Tooltip("ratio:Q", format=".3f"), "note:N"],
        )
        .properties(width=160, height=height(names))
    )
    gone = left_out([b["name"] for b in bars if b["ratio"] is None])
    chart = alt.hconcat(left, right, spacing=12)
    if any(row.get("curve") for row in rows):
        chart = alt.vconcat(chart, _curves(alt, rows), spacing=24)
    return titled(alt, chart, title or "Loss of rounding, by layer", gone)


def _name(row: dict[str, Any]) -> str:
    """The name of a layer, with the number of the turn where a loop stacks it."""
    turn = row.get("turn")
    return str(row["layer"]) if turn is None else f"{row['layer']}[{turn}]"


def _curves(alt: Any, rows: list[dict[str, Any]]) -> Any:
    """One line per layer: the loss it minimises over that of rounding to nearest, by time."""
    points = []
    for row in rows:
        curve, nearest = row.get("curve") or [], number(row["nearest loss"])
        for i, loss in enumerate(curve if nearest else []):
            done = (i + 1) / len(curve)
            part = loss / nearest
            points.append({"name": _name(row), "done": done, "part": part})
    percent = alt.Axis(format="%")
    return (
        alt.Chart(data(alt, points), name="curve")
        .mark_line(strokeWidth=1, opacity=0.6, color=AFTER)
        .encode(
            x=alt.X("done:Q", title="part of the iterations", axis=percent),
            y=alt.Y("part:Q", title="loss while it is chosen / nearest"),
            detail="name:N",
            tooltip=["name:N", alt.Tooltip("part:Q", format=".3f")],
        )
        .properties(width=480, height=180)
    )


def _loss(alt: Any, losses: list[Any]) -> Any:
    low, high = min(losses, default=1.0) / 1.3, max(losses, default=1.0) * 1.3
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return alt.X("loss:Q", scale=scale, axis=log_axis(alt, low, high, title="loss"))
