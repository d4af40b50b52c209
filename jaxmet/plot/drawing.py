"""What all pictures share: Altair itself, colours, an axis of names, a title.

Fields of the data have plain names of our own, and what users named stands only in values:
Vega would read a dot or a bracket in a field as a path.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmet.plot.tables import number
from jaxmet.tree.packages import package

INSTALL = "altair vl-convert-python"
ROWS = "rows"
"""Views of this name, or with a number after it, draw one mark for each of their records."""

KINDS = {"weight": "#2f6f9f", "activation": "#d9822b"}
BEFORE, AFTER = "#b4bac4", "#2f6f9f"
BAD, GOOD, QUIET = "#c0392b", "#3a7d44", "#8a93a0"
STEP = 15  # pixels a name
WIDTH = 500


def altair(caller: str) -> Any:
    """Altair, which only pictures need."""
    return package("altair", caller, INSTALL)


def vl_convert(caller: str) -> Any:
    """What renders charts without a browser, and holds the scripts of the report."""
    return package("vl_convert", caller, INSTALL)


def version_of_vega_lite(caller: str) -> str:
    """The version of Vega-Lite that Altair writes, as vl-convert names it."""
    return "_".join(altair(caller).SCHEMA_VERSION.split(".")[:2])


def data(alt: Any, records: Iterable[Mapping[str, Any]]) -> Any:
    """Records as data of a chart; what is no finite number is absent."""
    clean = [{k: _plain(v) for k, v in record.items()} for record in records]
    return alt.InlineData(values=clean)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    return number(value)


def layered(alt: Any, charts: Sequence[Any]) -> Any:
    """Charts on top of each other, without those that have nothing to draw."""
    full = [c for c in charts if getattr(c.data, "values", True)]
    return alt.layer(*(full or charts[-1:]))


def shortened(name: str, most: int) -> str:
    """A name without its middle where it is long: names differ at their ends."""
    head = most // 3
    return name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}"


def shown(most: int) -> str:
    """`shortened` as an expression of Vega, of the label of an axis or a heading."""
    head, label = most // 3, "datum.label"
    ends = f"slice({label}, 0, {head}) + '…' + slice({label}, {head + 1 - most})"
    return f"length({label}) <= {most} ? {label} : {ends}"


def told_apart(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of quantizers, with their kind where a weight and an activation share one."""
    kinds: dict[str, set[Any]] = {}
    for row in rows:
        kinds.setdefault(str(row["tensor"]), set()).add(row["kind"])
    return [
        f"{row['tensor']} ({row['kind']})" if len(kinds[str(row["tensor"])]) > 1
        else str(row["tensor"])
        for row in rows
    ]  # fmt: skip


def names_axis(alt: Any, names: Sequence[str], field: str = "name") -> Any:
    """The names of a network from top to bottom, in the order in which it runs."""
    axis = alt.Axis(
        title=None, labelLimit=330, labelExpr=shown(46), ticks=False, domain=False
    )
    scale = alt.Scale(domain=list(dict.fromkeys(names)))
    return alt.Y(f"{field}:N", scale=scale, axis=axis)


def no_names(alt: Any, names: Sequence[str], field: str = "name") -> Any:
    """The same axis for a picture to the right of one that has the names."""
    scale = alt.Scale(domain=list(dict.fromkeys(names)))
    return alt.Y(f"{field}:N", scale=scale, axis=None)


def height(names: Sequence[str], step: int = STEP) -> int:
    """The height of a picture with a line a name."""
    return max(step * len(dict.fromkeys(names)), 2 * step)


def colours(alt: Any, of: Mapping[str, str], field: str = "kind", **more: Any) -> Any:
    """A colour a category, always the same one."""
    scale = alt.Scale(domain=list(of), range=list(of.values()))
    legend = alt.Legend(title=None, orient="top", **more)
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def titled(alt: Any, chart: Any, title: str | None, *lines: str | None) -> Any:
    """The chart with a title, and the lines below it."""
    shown = [line for line in lines if line]
    text = alt.TitleParams(
        title or "",
        subtitle=shown,
        anchor="start",
        offset=12,
        fontSize=14,
        subtitleFontSize=11,
        subtitleColor="#5b6470",
    )
    return chart.properties(title=text)


def left_out(names: Sequence[str], why: str = "no number") -> str | None:
    """A line for a subtitle about the rows that nothing can be drawn of."""
    if not names:
        return None
    each = list(dict.fromkeys(names))
    some = ", ".join(each[:3]) + (", …" if len(each) > 3 else "")
    return f"left out, {why}: {some} ({len(names)} in all)"


def log_axis(alt: Any, low: float | int, high: float | int, **more: Any) -> Any:
    """A logarithmic axis that is not crowded: powers of ten, of few 2 and 5 between them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    inside = [v for v in values if low <= v <= high]
    return alt.Axis(values=inside or [low, high], format="~g", **more)


def drawn_rows(spec: Any, inherited: Any = None, sets: Any = None) -> int:
    """How many marks a chart's spec must draw for its rows: records of its `ROWS` views."""
    if not isinstance(spec, Mapping):
        return 0
    sets = spec.get("datasets", sets) or {}
    own = spec.get("data", inherited)
    if str(spec.get("name", "")).partition("_")[0] == ROWS:
        values = (own or {}).get("values", sets.get((own or {}).get("name"), []))
        return len(values)
    parts = [spec.get("spec")]
    for key in ("layer", "hconcat", "vconcat", "concat"):
        parts += spec.get(key, [])
    return sum(drawn_rows(part, own, sets) for part in parts)
