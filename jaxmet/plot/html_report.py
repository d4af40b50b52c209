"""Everything about one model in one HTML file that opens offline."""

import functools
import html
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from jaxmet.analysis.compare import compare as compared
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.matching import check_quantizers
from jaxmet.layers.reference import float_model
from jaxmet.plot.compare_plot import compare
from jaxmet.plot.drawing import altair, version_of_vega_lite, vl_convert
from jaxmet.plot.graph_plot import graph as graph_chart
from jaxmet.plot.noise_plot import noise
from jaxmet.plot.page import Section, folded, page, picture, table_html
from jaxmet.plot.ratio_scores import ratio_scores
from jaxmet.plot.relative_ranges import relative_table, relative_weight_ranges
from jaxmet.plot.rounding_loss import rounding_loss
from jaxmet.plot.sensitivity_plot import sensitivity
from jaxmet.plot.tables import kind_of, number
from jaxmet.plot.verdict import verdict
from jaxmet.plot.weight_ranges import weight_ranges
from jaxmet.tree.batches import one_batch
from jaxmet.tree.checks import check_concrete, is_concrete
from jaxmet.tree.quantizer import granularity, scale_text
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.version import __version__
from jaxmet.tree.writing import writable, written

CALLER = "report"
PICTURES: dict[str, Callable[..., Any]] = {
    "sensitivity": sensitivity,
    "noise": noise,
    "compare": compare,
    "ratio_scores": ratio_scores,
    "rounding_loss": rounding_loss,
}
HEADINGS = {
    "sensitivity": "Sensitivity",
    "noise": "Noise of every quantizer",
    "compare": "Where the error enters",
    "ratio_scores": "Compression: score by ratio",
    "rounding_loss": "Rounding",
}
VERDICT = "In short"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
TALL = 26  # nodes of a graph that are seen without scrolling


def report(
    path: str | os.PathLike[str],
    params: Any,
    graph: Graph,
    *,
    quantizers: Quantizers | None = None,
    batch: Any = None,
    before: Any = None,
    tables: Any = (),
    scores: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "jaxmet report",
) -> None:
    """Write one HTML file about a model: it needs no network and no other file.

    It shows what it was given and computes nothing else. First, in short: `scores` by name, such as
    float and quantized; with `quantizers` the bits and the size; the three quantizers that cost
    most, and what to try next, where a table of `jm.noise` is among `tables` (else the three nodes
    where most error enters). Then the model, what of it is quantized, what not and why; ranges of
    weights, and those of `before`, a tree of the same model from before; with quantizers and one
    `batch` of inputs `jm.compare`, where the error enters (against `before` if its channels are
    scaled as these are, else against `params` without quantizers, and it says which); every one of
    `tables`, as a picture too where it is one of `jm.sensitivity`, `jm.noise`, `jm.compare`,
    `jm.score_ratios` or a report of `jm.adaround`; `settings` by name, and versions. Beside every
    picture its table is folded away.

    The file appears under its name only when it is complete.

    Args:
        path: the HTML file to write.
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: quantizers to show; default None.
        batch: inputs on which float and quantized are compared; default None: no comparison.
        before: a tree of the same model from before, drawn beside `params`; default None.
        tables: tables of jaxmet to show, one or several; default none.
        scores: numbers by name, such as float and quantized; default None.
        settings: values by name that are listed; default None.
        title: the heading; default 'jaxmet report'.

    Raises:
        ValueError: before any work, for a path that is a folder, is read-only or has no folder,
            for a tree that is not the graph's and for tables that are none.
        ImportError: without the extra `plot`.

    >>> jm.report("report.html", params, graph, quantizers=quantizers, batch=images[:64])
    """
    altair(CALLER)
    vl = vl_convert(CALLER)
    path = writable(path, CALLER)
    graph, _ = fitted(params, graph, CALLER)
    tables = _check(params, graph, quantizers, before, tables)
    if not isinstance(title, str):
        raise ValueError(
            f"jaxmet.{CALLER}: the title is of type {type(title).__name__}. Give a text."
        )
    if batch is not None:
        batch = one_batch(batch, CALLER)
    scores, settings = _named(scores, "scores"), _named(settings, "settings")
    book = Book()
    _plan(book, params, graph, quantizers)
    _ranges(book, params, graph, before)
    found = None
    if quantizers is not None and batch is not None:
        found = _error(book, params, graph, quantizers, batch, before)
    for table in tables:
        book.table(table, kind_of(table) if len(table) else None)
    if settings:
        book.add("Settings", table_html(_pairs(settings, "setting")))
    book.add("Versions", table_html(_pairs(_versions(), "package")))
    kinds = {kind_of(t): t for t in reversed(tables) if len(t)}
    given = scores, kinds.get("noise"), kinds.get("compare", found)
    first = verdict(params, quantizers, *given, book.address)
    if first:
        book.sections.insert(0, Section(VERDICT, first))
    script = _vega(vl) if book.specs else ""
    layers = f"{len(graph.nodes)} nodes, {len(graph.layers)} layers"
    content = page(title, layers, book.sections, book.specs, script)
    written(path, lambda file: file.write(content.encode()))


def _check(
    params: Any, graph: Any, quantizers: Any, before: Any, tables: Any
) -> list[Table]:
    check_concrete(params, CALLER)
    if before is not None:
        try:
            graph.leaves(before, CALLER)
            check_concrete(before, CALLER)
        except ValueError as error:
            sentence = str(error).removeprefix(f"jaxmet.{CALLER}: ").split(". ")[0]
            raise ValueError(
                f"jaxmet.{CALLER}: before is no tree of this graph: {sentence}. Give one that "
                "was factorized and pruned as params is, or none."
            ) from error
    if quantizers is not None:
        check_quantizers(quantizers, graph, CALLER, params)
    if isinstance(tables, Table):
        raise ValueError(
            f"jaxmet.{CALLER}: tables is one table. Give several: tables=[table]."
        )
    if not isinstance(tables, Iterable):
        raise ValueError(
            f"jaxmet.{CALLER}: tables is of type {type(tables).__name__}. Give a list."
        )
    tables = list(tables)
    for i, table in enumerate(tables):
        if not isinstance(table, Table):
            raise ValueError(
                f"jaxmet.{CALLER}: entry {i} of tables is of type "
                f"{type(table).__name__}. Give tables of jm.Table."
            )
    return tables


def _named(values: Any, what: str) -> dict[str, Any]:
    """Values by name, refused where they are none or traced."""
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(
            f"jaxmet.{CALLER}: {what} is of type {type(values).__name__}. Give a mapping "
            "of names to values."
        )
    for name, value in values.items():
        if not all(is_concrete(leaf) for leaf in jax.tree.leaves(value)):
            raise ValueError(
                f"jaxmet.{CALLER}: {name!r} of {what} is traced. Call it outside of jax.jit."
            )
    return dict(values)


class Book:
    """The sections so far, and the charts in them by the id of their place."""

    def __init__(self) -> None:
        self.sections: list[Section] = []
        self.specs: dict[str, dict[str, Any]] = {}

    def add(self, title: str, *body: str) -> None:
        self.sections.append(Section(title, "".join(body)))

    def address(self, kind: str) -> str | None:
        """Where the section of a table will stand, after the verdict that comes first."""
        titles = [section.title for section in self.sections]
        heading = HEADINGS[kind]
        return f"#part{titles.index(heading) + 1}" if heading in titles else None

    def chart(self, chart: Any, *, tall: bool = False) -> str:
        """The place of a chart, whose specification is kept."""
        name = f"chart{len(self.specs)}"
        body, self.specs[name] = picture(chart, name, tall=tall)
        return body

    def table(self, table: Table, kind: str | None, *notes: str) -> None:
        """A section for a table: as a picture where there is one for it."""
        if kind is None:
            self.add(table.title or "Table", table_html(table))
            return
        lines = [table.title, *notes] if table.title else notes
        sentence = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        place = self.chart(PICTURES[kind](table))
        rows = folded(f"the table, {len(table)} rows", table_html(table))
        self.add(HEADINGS[kind], sentence, place, rows)


# Sections


def _plan(book: Book, params: Any, graph: Graph, quantizers: Quantizers | None) -> None:
    """The model as a drawing, and the quantizers with the reasons of those that are absent."""
    tall = len(graph.nodes) > TALL
    chart = graph_chart(graph, params=params, quantizers=quantizers)
    body = [book.chart(chart, tall=tall)]
    body.append(folded(f"{len(graph.nodes)} nodes", table_html(graph.table())))
    book.add("The model", *body)
    if quantizers is None:
        return
    grids, left = quantizer_tables(quantizers)
    counts = f"{len(quantizers.weights)} weights and biases, "
    counts += f"{len(quantizers.activations)} activations are quantized."
    parts = [f"<p>{counts}</p>", folded(f"{len(grids)} quantizers", table_html(grids))]
    if len(left):
        parts.append(f"<p>{len(left)} things stay in float:</p>")
        parts.append(table_html(reasons(left)))
        parts.append(folded("each of them", table_html(left)))
    book.add("What is quantized, and what is not", *parts)


def quantizer_tables(quantizers: Quantizers) -> tuple[Table, Table]:
    """The quantizers, one per row, and what has none with the reason."""
    rows = [(n, "weight", q) for n, q in quantizers.weights.items()]
    rows += [(n, "activation", q) for n, q in quantizers.activations.items()]
    grids = Table(
        {
            "tensor": [n for n, _, _ in rows],
            "kind": [k for _, k, _ in rows],
            "bits": [q.bits if q.enabled else None for _, _, q in rows],
            "symmetric": ["yes" if q.symmetric else "no" for _, _, q in rows],
            "one scale per": [granularity(q) for _, _, q in rows],
            "scale": [scale_text(q, k) for _, k, q in rows],
        }
    )
    left = Table(
        {
            "tensor": [n for n, _ in quantizers.skipped],
            "why": [why for _, why in quantizers.skipped],
        }
    )
    return grids, left


def reasons(left: Table) -> Table:
    """Why things stay in float: how many for each reason, and the first few."""
    found: dict[str, list[str]] = {}
    for row in left:
        found.setdefault(row["why"], []).append(row["tensor"])
    some = [", ".join(n[:3]) + (", …" if len(n) > 3 else "") for n in found.values()]
    counts = [len(names) for names in found.values()]
    return Table({"why": list(found), "how many": counts, "tensor": some})


def _ranges(book: Book, params: Any, graph: Graph, before: Any) -> None:
    trees = (params, None) if before is None else (before, params)
    if not any(layer.weight and layer.weight.name for layer in graph.layers):
        sentence = "All weights are computed from several parameters."
        book.add("Ranges of weights", f'<p class="quiet">{sentence}</p>')
        return
    charts = [
        draw(trees[0], graph, after=trees[1])
        for draw in (relative_weight_ranges, weight_ranges)
    ]
    heading = "Ranges of weights" + ("" if before is None else ", before and after")
    table = relative_table(trees[0], graph, after=trees[1])
    rows = folded(f"the table, {len(table)} rows", table_html(table))
    book.add(heading, book.chart(charts[0]), rows, book.chart(charts[1]))


def _error(
    book: Book,
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batch: Any,
    before: Any,
) -> Table:
    """Where the error enters: against `before`, unless its channels are scaled otherwise."""
    sentence = "Float is the same tree without quantizers."
    if before is not None:
        sentence = "Float is the tree from before."
        try:
            float_model(before, params, graph, quantizers, CALLER)
        except ValueError:  # cannot be compared node by node: only one is equalized
            sentence = (
                "Float is the same tree without quantizers: the channels of the tree from "
                "before are scaled in another way."
            )
            before = None
    table = compared(params, graph, quantizers, batch, reference=before)
    book.table(table, "compare" if len(table) else None, sentence)
    return table


def _pairs(values: Mapping[str, Any], what: str) -> Table:
    names = [str(name) for name in values]
    return Table({what: names, "": [_shown(v) for v in values.values()]})


def _shown(value: Any) -> Any:
    return value if number(value) is not None else str(value)


def _versions() -> dict[str, str]:
    found = {"jaxmet": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    device = jax.devices()[0]
    found["python"] = platform.python_version()
    found["device"] = f"{device.device_kind} ({device.platform})"
    return found


@functools.cache
def _vega(vl: Any) -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `vegaEmbed`."""
    return vl.javascript_bundle(vl_version=version_of_vega_lite(CALLER))
