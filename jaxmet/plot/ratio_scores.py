"""The score of the network with one layer compressed, for every ratio."""

from collections.abc import Mapping
from typing import Any

from jaxmet.plot.drawing import (
    QUIET,
    ROWS,
    WIDTH,
    altair,
    data,
    height,
    layered,
    left_out,
    names_axis,
    titled,
)
from jaxmet.plot.tables import ALL, checked, number, rows_of
from jaxmet.tree.globs import suggestion

LINES = 12  # of more layers one cannot tell the colours apart


def ratio_scores(
    table: Any, chosen: Mapping[str, float] | None = None, *, title: str | None = None
) -> Any:
    """The table of `jm.score_ratios` as a chart, with the ratios that were chosen.

    Up to twelve layers are lines of score against ratio; more are a map with one row per layer,
    coloured by score. `chosen`, what `jm.select_ratios` returned, is drawn in: a ring at the
    ratio that each layer got. A score that is NaN leaves a gap and is named.

    Args:
        table: the table of `jm.score_ratios`.
        chosen: what `jm.select_ratios` returned; default None: no choice is drawn.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a table that is empty or another's, and for a chosen layer that it does
            not have.

    >>> jm.plot.ratio_scores(table, jm.select_ratios(table, 0.5))
    """
    alt, table = altair("plot.ratio_scores"), checked(table, "ratio_scores")
    every = [
        {
            "name": str(row["layer"]),
            "ratio": number(row["ratio"]),
            "score": number(row["score"]),
        }
        for row in rows_of(table)
    ]
    rows = [r for r in every if None not in r.values()]
    names = list(dict.fromkeys(r["name"] for r in every)) or [ALL]
    rings = _chosen({} if chosen is None else chosen, rows, names, table)
    draw = _lines if len(names) <= LINES else _map
    whole = [number(r["score"]) for r in table.where(layer=ALL)]
    chart = draw(alt, rows, names, rings, [w for w in whole if w is not None])
    gone = left_out([r["name"] for r in every if None in r.values()])
    subtitle = "rings: the chosen ratios" if rings else None
    heading = title or "Score with one layer compressed"
    return titled(alt, chart, heading, subtitle, gone)


def _chosen(
    chosen: Mapping[str, float], rows: list[dict], names: list[str], table: Any
) -> list[dict]:
    """Where the chosen ratios stand: at the row of the table that is nearest."""
    if not isinstance(chosen, Mapping):
        raise ValueError(
            f"jaxmet.plot.ratio_scores: chosen is of type {type(chosen).__name__}. Give the "
            "ratios that jm.select_ratios returned."
        )
    tied = {n for t in table.columns.get("tied", []) if t for n in str(t).split(", ")}
    rings = []
    for name, ratio in chosen.items():
        if name in tied and name not in names:
            continue
        if name not in names:
            raise ValueError(
                f"jaxmet.plot.ratio_scores: the table has no layer {name!r}, for which a "
                f"ratio was chosen. {suggestion(name, names)}"
            )
        mine = [r for r in rows if r["name"] == name]
        if mine:
            rings.append(min(mine, key=lambda r: abs(r["ratio"] - ratio)))
    return rings


TIP = ("name:N", "ratio:Q", "score:Q")


def _lines(alt: Any, rows: Any, names: Any, rings: Any, whole: Any) -> Any:
    x = alt.X("ratio:Q", title="cost of the layer: after / before")
    y = alt.Y("score:Q", scale=alt.Scale(zero=False))
    color = alt.Color(
        "name:N",
        scale=alt.Scale(domain=names, scheme="tableau20"),
        legend=alt.Legend(title=None, labelLimit=260),
    )
    base = {"x": x, "y": y, "color": color, "tooltip": list(TIP)}
    layers = [
        alt.Chart(data(alt, [{"score": w} for w in whole[:1]]))
        .mark_rule(strokeDash=[4, 3], color=QUIET)
        .encode(y="score:Q"),
        alt.Chart(data(alt, rows)).mark_line(strokeWidth=1.4).encode(**base),
        alt.Chart(data(alt, rows), name=ROWS)
        .mark_point(filled=True, size=26)
        .encode(**base),
        alt.Chart(data(alt, rings))
        .mark_point(size=170, strokeWidth=2.2)
        .encode(**base),
    ]
    return layered(alt, layers).properties(width=WIDTH, height=300)


def _map(alt: Any, rows: Any, names: Any, rings: Any, whole: Any) -> Any:
    del whole
    ratios = sorted({r["ratio"] for r in rows})
    x = alt.X(
        "ratio:O",
        scale=alt.Scale(domain=ratios),
        axis=alt.Axis(title="cost of the layer: after / before", labelAngle=0),
    )
    base = {"x": x, "y": names_axis(alt, names), "tooltip": list(TIP)}
    cells = (
        alt.Chart(data(alt, rows), name=ROWS)
        .mark_rect(stroke="white", strokeWidth=0.5)
        .encode(**base, color=alt.Color("score:Q", scale=alt.Scale(scheme="viridis")))
    )
    marks = (
        alt.Chart(data(alt, rings))
        .mark_point(size=60, stroke="#1d2530", strokeWidth=2, opacity=1)
        .encode(**base)
    )
    return layered(alt, [cells, marks]).properties(width=WIDTH, height=height(names))
