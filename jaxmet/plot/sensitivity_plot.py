"""The score with one quantizer alone, and with all but one."""

from typing import Any

from jaxmet.plot.drawing import (
    GOOD,
    KINDS,
    QUIET,
    ROWS,
    WIDTH,
    altair,
    colours,
    data,
    height,
    left_out,
    names_axis,
    titled,
    told_apart,
)
from jaxmet.plot.tables import ALL, checked, number, rows_of

KEY = "full circle: only this quantizer is on; empty diamond: all but this one"
SHAPES = {"only this one is quantized": "circle", "all but this one are": "diamond"}
COLUMNS: dict[str, str] = dict(zip(("only this", "all but this"), SHAPES, strict=True))


def sensitivity(table: Any, *, title: str | None = None) -> Any:
    """The table of `jm.sensitivity` as a chart: two points per quantizer, weights first.

    The full circle is the score with this quantizer alone on: left of the others, it harms by
    itself. The empty diamond is the score with all quantizers but this one: right of the others,
    the network would win by it. Dashed lines are the float and the quantized score. Several
    widths stand side by side. A score that is NaN leaves a gap, and the subtitle names it.

    Args:
        table: the table of `jm.sensitivity`.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a table that is empty or another's.

    >>> jm.plot.sensitivity(jm.sensitivity(params, graph, quantizers, score))
    """
    alt, table = altair("plot.sensitivity"), checked(table, "sensitivity")
    rows = list(rows_of(table))
    names = told_apart(rows) or [ALL]
    points = [
        _point(row, column) | {"name": name}
        for row, name in zip(rows, names, strict=False)
        for column in COLUMNS
    ]
    known = [p for p in points if p["score"] is not None]
    gone = [p["name"] for p in points if p["score"] is None]
    widths = list(dict.fromkeys(row["bits"] for row in rows)) or [None]
    charts = [_chart(alt, i, b, known, table, names) for i, b in enumerate(widths)]
    if len(widths) == 1:
        chart = charts[0].properties(width=WIDTH)
    else:
        charts = [
            c.properties(width=WIDTH * 3 // 2 // len(widths), title=f"{b} bits")
            for c, b in zip(charts, widths, strict=True)
        ]
        chart = alt.hconcat(*charts).resolve_scale(x="shared")
    heading = title or "Score with one quantizer alone, and with all but one"
    notes = left_out(gone)
    return titled(alt, chart, heading, KEY, _legend(table), notes)


def _point(row: dict[str, Any], column: str) -> dict[str, Any]:
    fill = KINDS.get(str(row["kind"]), QUIET) if column == "only this" else "white"
    return {
        "layer": row["layer"],
        "kind": row["kind"],
        "bits": number(row["bits"]),
        "shown": COLUMNS[column],
        "fill": fill,
        "score": number(row[column]),
    }


def _chart(
    alt: Any, i: int, bits: Any, points: Any, table: Any, names: list[str]
) -> Any:
    """The points of one width, and the lines of the whole network at it."""
    shape = alt.Shape(
        "shown:N",
        scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())),
        legend=None,
    )
    y = names_axis(alt, names)
    if i:
        y.axis = None
    dots = (
        alt.Chart(
            data(alt, [p for p in points if p["bits"] == bits]), name=f"{ROWS}_{i}"
        )
        .mark_point(size=44, strokeWidth=1.6, opacity=1)
        .encode(
            x=alt.X("score:Q", title="score", scale=alt.Scale(zero=False, padding=10)),
            y=y,
            color=colours(alt, KINDS, symbolType="square", symbolFillColor="white"),
            fill=alt.Fill("fill:N", scale=None),
            shape=shape,
            tooltip=["name:N", "layer:N", "kind:N", "bits:Q", "shown:N", "score:Q"],
        )
    )
    lines = _lines(table, bits)
    rules = alt.Chart(data(alt, lines)).mark_rule(strokeDash=[4, 3], strokeWidth=1.4)
    rules = rules.encode(
        x="score:Q",
        stroke=alt.Stroke("colour:N", scale=None),
        tooltip=["line:N", "score:Q"],
    )
    # The points have the axis of names, even where there is none.
    chart = alt.layer(rules, dots) if lines else alt.layer(dots)
    return chart.properties(height=height(names))


def _lines(table: Any, bits: Any) -> list[dict[str, Any]]:
    """The scores of the float and of the quantized network, where the table has them."""
    whole = [r for r in table.where(tensor=ALL) if r["kind"] is None]
    mine = [r for r in whole if r["bits"] == bits] or whole
    if not mine:
        return []
    row = mine[-1]
    found = [
        ("float", row["all but this"], GOOD),
        ("quantized", row["only this"], "#333333"),
    ]
    return [
        {"line": line, "score": number(score), "colour": colour}
        for line, score, colour in found
        if number(score) is not None
    ]


def _legend(table: Any) -> str | None:
    found = _lines(table, None)
    looks = {"float": "green", "quantized": "black"}
    notes = [
        f"{row['line']} {row['score'] + 0.0:.4g} ({looks[row['line']]})"
        for row in found
    ]
    return f"dashed: {', '.join(notes)}" if notes else None
