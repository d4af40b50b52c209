"""What can be had for what: points, and those that no other beats."""

from collections.abc import Sequence
from typing import Any

from jaxmet.plot.drawing import (
    AFTER,
    QUIET,
    ROWS,
    WIDTH,
    altair,
    data,
    layered,
    left_out,
    titled,
)
from jaxmet.plot.tables import number, with_columns

FEW = 12  # more names would stand on each other


def pareto(
    table: Any, *, x: str, y: str, label: str | None = None, title: str | None = None
) -> Any:
    """Rows of any table as points, `x` a cost (less is better), `y` a worth (more is).

    The points that no other beats are joined: whoever wants more of `y` than one of them has
    to pay more of `x`. `label` is the column that names them; of more than 12 rows the others
    have their names in tooltips alone. Rows without both numbers are left out and named.

    Args:
        table: any `jm.Table` with rows.
        x: the column of costs: less is better.
        y: the column of worths: more is better.
        label: the column that names the points; default None: no names.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for an empty table, a column that is not there, or one that holds no number.

    >>> jm.plot.pareto(table, x="macs", y="accuracy", label="network")
    """
    alt = altair("plot.pareto")
    wanted = [x, y] if label is None else [x, y, label]
    table = with_columns(
        table, wanted, "plot.pareto", "your own choice, naming columns"
    )
    for name in (x, y):
        if all(number(value) is None for value in table[name]):
            raise ValueError(
                f"jaxmet.plot.pareto: the column {name!r} holds no number, but "
                f"{table[name][0]!r}. Name a column of numbers."
            )
    every = [
        {
            "x": number(row[x]),
            "y": number(row[y]),
            "name": str(i if label is None else row[label]),
        }
        for i, row in enumerate(table)
    ]
    rows = [r for r in every if r["x"] is not None and r["y"] is not None]
    best = front([(r["x"], r["y"]) for r in rows])
    for i, row in enumerate(rows):
        row["colour"] = AFTER if i in best else QUIET
    base = {
        "x": alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=True, padding=20)),
        "y": alt.Y("y:Q", title=y, scale=alt.Scale(zero=False, nice=True, padding=20)),
    }
    tip = [alt.Tooltip("name:N", title=label or "row"), *_tips(alt, x, y)]
    points = alt.Chart(data(alt, rows), name=ROWS).mark_point(filled=True, size=60)
    layers = [
        alt.Chart(data(alt, [rows[i] for i in best]))
        .mark_line(interpolate="step-after", color=AFTER, strokeWidth=1.3, opacity=0.6)
        .encode(**base, order="x:Q"),
        points.encode(**base, color=alt.Color("colour:N", scale=None), tooltip=tip),
    ]
    if label is not None:
        named = rows if len(rows) <= FEW else [rows[i] for i in best]
        text = alt.Chart(data(alt, named)).mark_text(
            align="left", baseline="bottom", dx=6, dy=-3, fontSize=10
        )
        layers.append(
            text.encode(**base, text="name:N", color=alt.Color("colour:N", scale=None))
        )
    chart = layered(alt, layers).properties(width=WIDTH + 100, height=320)
    gone = left_out([r["name"] for r in every if r not in rows])
    subtitle = f"{len(best)} of {len(rows)} that no other beats"
    return titled(alt, chart, title or f"{y} against {x}", subtitle, gone)


def _tips(alt: Any, x: str, y: str) -> list[Any]:
    return [alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]


def front(points: Sequence[tuple[float | int, float | int]]) -> list[int]:
    """The indices of the points that no other beats, by rising x.

    A point is beaten by one with no more x and no less y, and one of the two truly better.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best: list[int] = []
    for i in order:
        x, y = points[i]
        if not best or y > points[best[-1]][1] or points[best[-1]] == (x, y):
            best.append(i)
    return best
