"""Tables: rows, columns, filters and how they print."""

import builtins

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmet import Table


def table():
    columns = {
        "layer": ["stem", "head"],
        "sqnr": [12.34567, None],
        "macs": [1234567, np.int32(8)],
        "left": [False, True],
    }
    return Table(columns, title="Layers")


def test_rows_columns_and_length():
    t = table()
    assert len(t) == 2
    assert t["layer"] == ["stem", "head"]
    assert [row["macs"] for row in t] == [1234567, 8]
    assert list(next(iter(t))) == ["layer", "sqnr", "macs", "left"]
    with pytest.raises(KeyError, match="no column 'layers'.*'layer'"):
        t["layers"]


def test_columns_must_be_equally_long():
    with pytest.raises(ValueError, match=r"jaxmet\.Table.*'a': 1.*'b': 2"):
        Table({"a": [1], "b": [1, 2]})


def test_columns_are_copied():
    column = [1, 2]
    t = Table({"a": column})
    column.append(3)
    assert t["a"] == [1, 2]


def test_where():
    t = table()
    assert t.where(layer="head")["macs"] == [8]
    assert t.where(sqnr=None)["layer"] == ["head"]
    assert len(t.where(layer="stem", left=True)) == 0
    with pytest.raises(KeyError, match="'kind'"):
        t.where(kind=1)


def test_concat_keeps_all_columns():
    t = Table.concat(Table({"a": [1]}), Table({"a": [2], "b": ["x"]}), title="both")
    assert t.columns == {"a": [1, 2], "b": [None, "x"]} and t.title == "both"


def test_it_prints_aligned():
    assert repr(table()).splitlines() == [
        "Layers",
        "layer   sqnr     macs  left",
        "stem   12.35  1234567  no",
        "head       –        8  yes",
    ]
    numbers = Table({"x": [1e-9, float("nan"), jnp.float32(2), 100.0, 123456.0]})
    assert repr(numbers).split() == ["x", "1e-09", "nan", "2", "100", "1.235e+05"]
    assert "(no rows)" in repr(Table({"a": []}))
    curves = Table({"curve": [[0.51234, 0.4, 0.25], None, [1, 2], []]})
    assert repr(curves).split("\n")[1:] == ["0.5123 … 0.25", "–", "1, 2", "[]"]
    assert len(Table({})) == 0 and repr(Table({}))


def test_html_escapes():
    text = Table({"a<b": ["<x>", None]}, title="t & u")._repr_html_()
    assert "<caption>t &amp; u</caption>" in text
    assert "<th>a&lt;b</th>" in text and "<td>&lt;x&gt;</td>" in text
    assert text.count("<tr>") == 3
    assert 'style="text-align:right">7<' in Table({"n": [7]})._repr_html_()


def test_pandas_is_named_where_it_is_missing(monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        table().to_pandas()


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = table().to_pandas()
    assert (
        isinstance(frame, pandas.DataFrame) and list(frame["layer"]) == table()["layer"]
    )


def test_columns_that_do_not_fit_the_terminal_are_named(monkeypatch):
    table = Table({"layer": ["a"], **{f"{i} bits": [i + 0.5] for i in range(2, 27)}})
    for columns, room in [("150", 150), ("40", 120)]:  # narrower ones wrap
        monkeypatch.setenv("COLUMNS", columns)
        *lines, last = repr(table).splitlines()
        assert room - 10 < max(map(len, lines)) <= room
        shown = [name.strip() for name in lines[0].split("  ") if name.strip()]
        hidden = last.removeprefix("(and the columns ").removesuffix(")").split(", ")
        assert shown + hidden == [*table.columns]
    monkeypatch.setenv("COLUMNS", "400")
    assert "and the columns" not in repr(table)
    monkeypatch.setenv("COLUMNS", "1")
    wide = Table({"a": ["x" * 100], "b": ["y" * 100], "c": [1]})
    assert repr(wide).endswith("(and the columns c)")


@pytest.mark.parametrize(
    "columns", [[1, 2], {"a": 3}, {"a": "text"}, {"a": np.ones(())}]
)
def test_columns_are_lists_by_name(columns):
    with pytest.raises(ValueError, match=r"jaxmet\.Table: the columns are no mapping"):
        Table(columns)
    assert Table({"a": np.arange(2), "b": ("x", "y")})["a"] == [0, 1]


def test_a_column_is_a_list_of_its_own():
    t = Table({"a": [2, 1], "b": ["x", "y"]}, title="largest: x")
    t["a"].sort()
    assert t["a"] == [2, 1]
    assert t.where(b="x").title == "" and t.where().title == "largest: x"
    with pytest.raises(KeyError, match="no column slice"):
        t[0:1]
    with pytest.raises(ValueError, match=r"Table\.concat: got a list"):
        Table.concat([t, t])
    assert "x\\ny" in repr(Table({"a": ["x\ny"]}))
