"""Signal-to-noise ratios along the network."""

from typing import Any

from jaxmet.plot.drawing import (
    AFTER,
    BAD,
    QUIET,
    ROWS,
    altair,
    colours,
    data,
    height,
    layered,
    left_out,
    names_axis,
    no_names,
    titled,
)
from jaxmet.plot.tables import checked, number

SERIES = {"with all noise before it": AFTER, "its own noise alone": QUIET}


def compare(table: Any, *, title: str | None = None) -> Any:
    """The table of `jm.compare` as a chart: where along the network the error enters.

    To the left, by node, the signal-to-noise ratio with everything before it (a line, one
    point a row) and that of what the node adds itself; to the right how much of its error it
    adds itself. Nodes with a badly used quantizer have a red bar, and the note in the tooltip. Rows
    without noise or without a number leave gaps and are named.

    Args:
        table: the table of `jm.compare`.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a table that is empty or another's.

    >>> jm.plot.compare(jm.compare(params, graph, quantizers, images))
    """
    alt, table = altair("plot.compare"), checked(table, "compare")
    names = [str(n) for n in table["node"]]
    rows = [_record(i, row) for i, row in enumerate(table)]
    tip = [
        alt.Tooltip("name:N"),
        alt.Tooltip("all:Q", title="SQNR (dB)", format=".1f"),
        alt.Tooltip("own:Q", title="own SQNR (dB)", format=".1f"),
        alt.Tooltip("share:Q", title="own share", format=".1%"),
        alt.Tooltip("note:N"),
    ]
    x = alt.X("decibel:Q", title="SQNR (dB)", scale=alt.Scale(zero=False))

    def series(field: str, name: str) -> Any:
        mine = [r | {"decibel": r[field], "series": name} for r in rows]
        return data(alt, [r for r in mine if r["decibel"] is not None])

    first, second = SERIES
    color = colours(alt, SERIES, "series")
    common = {"y": names_axis(alt, names), "tooltip": tip, "color": color, "x": x}
    whole = series("all", first)
    left = layered(
        alt,
        [
            alt.Chart(series("own", second)).mark_point(size=34).encode(**common),
            alt.Chart(whole)
            .mark_line(strokeWidth=1.5)
            .encode(**common, order="place:Q"),
            alt.Chart(whole, name=ROWS)
            .mark_point(filled=True, size=40)
            .encode(**common),
        ],
    ).properties(width=320, height=height(names))
    right = (
        alt.Chart(data(alt, [r for r in rows if r["share"] is not None]))
        .mark_bar(height={"band": 0.7})
        .encode(
            x=alt.X(
                "share:Q", axis=alt.Axis(format="%", title="own share", tickCount=4)
            ),
            y=no_names(alt, names),
            color=alt.Color("bad:N", scale=None),
            tooltip=tip,
        )
        .properties(width=160, height=height(names))
    )
    gone = left_out(
        [r["name"] for r in rows if r["all"] is None], "no noise or no number"
    )
    flagged = [r["name"] for r in rows if r["note"]]
    subtitle = f"red: badly used quantizers ({len(flagged)})" if flagged else None
    chart = alt.hconcat(left, right, spacing=12)
    return titled(alt, chart, title or "Where the error enters", subtitle, gone)


def _record(place: int, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "place": place,
        "name": str(row["node"]),
        "all": number(row["SQNR (dB)"]),
        "own": number(row["own SQNR (dB)"]),
        "share": number(row["own share"]),
        "note": row.get("note"),
        "bad": BAD if row.get("note") else AFTER,
    }
