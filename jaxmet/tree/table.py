"""A small table: what every report of the library is."""

import html
import numbers
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.tree.packages import package


class Table:
    """Named columns of equal length.

    Iterating gives the rows as dicts, `table['layer']` a column (a list of its own), `len` the
    number of rows; it prints as aligned text, the columns that do not fit the terminal by name.

    Args:
        columns: a mapping of names to lists of equal length.
        title: the line above the table; default none.

    Raises:
        ValueError: for columns of different lengths, and for what is no mapping of names to
            lists.

    >>> jm.Table({"layer": ["stem", "head"], "macs": [9, 4]})["macs"]
    [9, 4]
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]], title: str = "") -> None:
        if not isinstance(columns, Mapping) or not all(map(_is_list, columns.values())):
            raise ValueError(
                "jaxmet.Table: the columns are no mapping of names to lists. Give "
                "Table({'layer': names, 'score': numbers})."
            )
        self.columns = {name: list(column) for name, column in columns.items()}
        self.title = title
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"jaxmet.Table: the columns have different lengths, {lengths}. Give "
                "every column one entry per row, None where there is none."
            )

    @classmethod
    def concat(cls, *tables: "Table", title: str = "") -> "Table":
        """The rows of several tables under each other; absent entries are None.

        Args:
            *tables: the tables, in this order.
            title: the title of the result; default none.

        Returns:
            One table with all columns.

        Raises:
            ValueError: for what is no table.

        >>> jm.Table.concat(jm.Table({"a": [1]}), jm.Table({"a": [2]}))["a"]
        [1, 2]
        """
        for table in tables:
            if not isinstance(table, Table):
                raise ValueError(
                    f"jaxmet.Table.concat: got a {type(table).__name__}. Give tables one by "
                    "one: Table.concat(first, second)."
                )
        names = list(dict.fromkeys(name for table in tables for name in table.columns))
        rows = [row for table in tables for row in table]
        return cls({name: [row.get(name) for row in rows] for name in names}, title)

    def where(self, **conditions: Any) -> "Table":
        """The rows in which every named column has the given value.

        The title speaks of all rows, so it stays only where all are kept.

        Args:
            **conditions: a value for each named column.

        Returns:
            A table of the rows that fit.

        Raises:
            KeyError: for a column that is not there.

        >>> jm.Table({"a": [1, 2]}).where(a=2)["a"]
        [2]
        """
        for name in conditions:
            self[name]
        keep = [
            all(_is(row[name], value) for name, value in conditions.items())
            for row in self
        ]
        columns = {
            name: [value for value, kept in zip(column, keep, strict=True) if kept]
            for name, column in self.columns.items()
        }
        return Table(columns, self.title if all(keep) else "")

    def to_pandas(self) -> Any:
        """The table as a `pandas.DataFrame`.

        Returns:
            A data frame with the same columns.

        Raises:
            ImportError: where pandas is not installed.

        >>> frame = table.to_pandas()
        """
        pandas = package("pandas", "Table.to_pandas", "pandas")
        return pandas.DataFrame(self.columns)

    def __getitem__(self, name: str) -> list[Any]:
        if not isinstance(name, str) or name not in self.columns:
            raise KeyError(
                f"jaxmet.Table: there is no column {name!r}. The columns are "
                f"{', '.join(map(repr, self.columns))}."
            )
        return list(self.columns[name])

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def __repr__(self) -> str:
        columns = [_aligned(name, column) for name, column in self.columns.items()]
        shown = _fitting([len(cells[0]) for cells in columns])
        lines = [
            "  ".join(cells).rstrip() for cells in zip(*columns[:shown], strict=True)
        ]
        if not len(self):
            lines.append("(no rows)")
        if hidden := list(self.columns)[shown:]:
            lines.append(f"(and the columns {', '.join(hidden)})")
        return "\n".join([self.title, *lines] if self.title else lines)

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str, right: Sequence[bool]) -> str:
            style = ' style="text-align:right"'
            return "".join(
                f"<{tag}{style if r else ''}>{html.escape(cell)}</{tag}>"
                for cell, r in zip(cells, right, strict=True)
            )

        right = [_is_numeric(column) for column in self.columns.values()]
        body = "".join(
            f"<tr>{row([_text(v) for v in values.values()], 'td', right)}</tr>"
            for values in self
        )
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        head = f"<thead><tr>{row(list(self.columns), 'th', right)}</tr></thead>"
        return f"<table>{title}{head}<tbody>{body}</tbody></table>"


def _is_list(column: Any) -> bool:
    scalar = isinstance(column, str) or getattr(column, "ndim", 1) == 0
    return isinstance(column, Iterable) and not scalar


def noted(table: Table, notes: Mapping[str, Sequence[str]]) -> str:
    """A table with lists under it, as text; empty lists are left out."""
    parts = [repr(table)]
    for title, lines in notes.items():
        parts += ["", title, *(f"  {line}" for line in lines)] if lines else []
    return "\n".join(parts)


def noted_html(table: Table, notes: Mapping[str, Sequence[str]]) -> str:
    """A table with lists under it, for a notebook; empty lists are left out."""
    parts = [table._repr_html_()]
    for title, lines in notes.items():
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        title = html.escape(title)
        parts += [
            f"<details><summary>{title}</summary><ul>{items}</ul></details>"
        ] * bool(lines)
    return "".join(parts)


def _fitting(widths: Sequence[int]) -> int:
    """How many columns fit the terminal, or 120 letters where it is narrower; two at least."""
    room = max(shutil.get_terminal_size((120, 24)).columns, 120)
    for shown in range(len(widths), 2, -1):
        if sum(widths[:shown]) + 2 * (shown - 1) <= room:
            return shown
    return min(2, len(widths))


def _is(value: Any, wanted: Any) -> bool:
    return bool(np.all(value == wanted)) if wanted is not None else value is None


def _aligned(name: str, column: Sequence[Any]) -> list[str]:
    cells = [name, *map(_text, column)]
    width = max(map(len, cells))
    align = str.rjust if _is_numeric(column) else str.ljust
    return [align(cell, width) for cell in cells]


def _is_numeric(column: Sequence[Any]) -> bool:
    known = [value for value in column if value is not None]
    return bool(known) and all(_is_number(value) for value in known)


def _is_number(value: Any) -> bool:
    if hasattr(value, "dtype"):
        return np.ndim(value) == 0 and np.asarray(value).dtype.kind not in "bUSO"
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(map(str, value)) or "–"
    if _is_number(value):
        return _number(value)
    if isinstance(value, list | tuple) and value and all(map(_is_number, value)):
        if len(value) > 2:
            return f"{_number(value[0])} … {_number(value[-1])}"
        return ", ".join(map(_number, value))
    return str(value).replace("\n", "\\n")


def _number(value: Any) -> str:
    whole = isinstance(value, numbers.Integral) or np.asarray(value).dtype.kind in "iu"
    return str(int(value)) if whole else f"{float(value):.4g}"
