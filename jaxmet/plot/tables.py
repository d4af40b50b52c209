"""Tables as pictures read them: which columns must be there, and what is a number."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxmet.tree.table import Table

ALL = "(all)"
REPORTS = {
    "sensitivity": ("tensor", "layer", "kind", "bits", "only this", "all but this"),
    "noise": ("tensor", "layer", "kind", "bits", "SQNR (dB)", "share"),
    "compare": ("node", "SQNR (dB)", "own SQNR (dB)", "own share"),
    "ratio_scores": ("layer", "ratio", "score"),
    "rounding_loss": ("layer", "loss", "nearest loss", "inherited", "ratio"),
}
"""The columns by which a picture knows its table, and what makes such tables."""

SOURCES = {
    "ratio_scores": "jm.score_ratios",
    "rounding_loss": "jm.adaround(…, with_report=True)",
}


def kind_of(table: Table) -> str | None:
    """The picture that is of this kind of table, None where there is none."""
    fits = (k for k, names in REPORTS.items() if {*names} <= {*table.columns})
    return next(fits, None)


def checked(table: Any, kind: str) -> Table:
    """The table, refused where it is another or has no rows."""
    source = SOURCES.get(kind, f"jm.{kind}")
    return with_columns(table, REPORTS[kind], f"plot.{kind}", source)


def with_columns(table: Any, names: Sequence[str], caller: str, source: str) -> Table:
    """The table, refused unless it has these columns and any row."""
    if not isinstance(table, Table):
        raise ValueError(
            f"jaxmet.{caller}: the table is of type {type(table).__name__}. Give the "
            f"jm.Table of {source}."
        )
    if missing := [name for name in names if name not in table.columns]:
        there = ", ".join(map(repr, table.columns)) or "none"
        raise ValueError(
            f"jaxmet.{caller}: the table has no column "
            f"{' and no column '.join(map(repr, missing))}. Its columns are {there}. Give "
            f"the table of {source}."
        )
    if not len(table):
        raise ValueError(
            f"jaxmet.{caller}: the table has no rows. Give the table of {source} for a "
            "network that has something to show."
        )
    return table


def number(value: Any) -> float | int | None:
    """A finite number as Python has it, None for everything else."""
    if value is None or isinstance(value, str | bool | np.bool_):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(found):
        return None
    return int(found) if isinstance(value, int | np.integer) else found


def split_rows(
    table: Table, *columns: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows whose numbers in these columns are finite, and the others."""
    known, unknown = [], []
    for row in table:
        fine = all(number(row[c]) is not None for c in columns)
        (known if fine else unknown).append(row)
    return known, unknown


def rows_of(table: Table) -> Iterator[dict[str, Any]]:
    """The rows of single quantizers or layers, without those of the whole network."""
    name = next((n for n in ("tensor", "layer") if n in table.columns), None)
    return (row for row in table if name is None or row[name] != ALL)
