"""The noise of every quantizer at the outputs."""

from typing import Any

from jaxmet.plot.drawing import (
    KINDS,
    ROWS,
    altair,
    colours,
    data,
    height,
    left_out,
    names_axis,
    no_names,
    titled,
    told_apart,
)
from jaxmet.plot.tables import ALL, checked, number, rows_of


def noise(table: Any, *, title: str | None = None) -> Any:
    """The table of `jm.noise` as a chart: one bar per quantizer, weights first.

    The bar is the quantizer's share of the whole noise at the outputs; the point beside it the
    signal-to-noise ratio in dB that it alone would leave, further left being worse. The colour
    says weight or activation. Rows without a number are left out and named.

    Args:
        table: the table of `jm.noise`.
        title: the heading of the picture; default None: one that says what is shown.

    Returns:
        An Altair chart; it shows itself in a notebook, and `jm.plot.save` writes it.

    Raises:
        ValueError: for a table that is empty or another's.

    >>> jm.plot.noise(jm.noise(params, graph, quantizers, batches))
    """
    alt, table = altair("plot.noise"), checked(table, "noise")
    rows = list(rows_of(table))
    names = told_apart(rows) or [ALL]
    bars = [_record(row) | {"name": n} for row, n in zip(rows, names, strict=False)]
    drawn = [b for b in bars if b["share"] is not None]
    tip = [
        alt.Tooltip("name:N"),
        alt.Tooltip("layer:N"),
        alt.Tooltip("bits:Q"),
        alt.Tooltip("share:Q", format=".2%"),
        alt.Tooltip("decibel:Q", title="SQNR (dB)", format=".1f"),
        alt.Tooltip("clipped:Q", format=".1%", title="of it by clipping"),
    ]
    color = colours(alt, KINDS)
    left = (
        alt.Chart(data(alt, drawn), name=ROWS)
        .mark_bar(height={"band": 0.7})
        .encode(
            x=alt.X(
                "share:Q",
                axis=alt.Axis(format="%", title="share of the noise", tickCount=5),
            ),
            y=names_axis(alt, names),
            color=color,
            tooltip=tip,
        )
        .properties(width=300, height=height(names))
    )
    right = (
        alt.Chart(data(alt, [b for b in bars if b["decibel"] is not None]))
        .mark_point(filled=True, size=40)
        .encode(
            x=alt.X(
                "decibel:Q",
                title="SQNR it alone leaves (dB)",
                scale=alt.Scale(zero=False),
            ),
            y=no_names(alt, names),
            color=color,
            tooltip=tip,
        )
        .properties(width=220, height=height(names))
    )
    gone = left_out([b["name"] for b in bars if b["share"] is None])
    chart = alt.hconcat(left, right, spacing=12)
    return titled(
        alt, chart, title or "Noise at the outputs, by quantizer", _total(table), gone
    )


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": row["layer"],
        "kind": row["kind"],
        "bits": number(row["bits"]),
        "share": number(row["share"]),
        "decibel": number(row["SQNR (dB)"]),
        "clipped": number(row.get("clipped")),
    }


def _total(table: Any) -> str | None:
    found = [number(r["SQNR (dB)"]) for r in table.where(tensor=ALL)]
    return (
        f"all together: {found[0]:.1f} dB" if found and found[0] is not None else None
    )
