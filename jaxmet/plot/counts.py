"""Histograms of activations, in one pass over the data."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Hook, Run
from jaxmet.layers.collect import Observer, collect, statistics_of
from jaxmet.numerics.histogram import (
    Histogram,
    Tally,
    histograms,
    merge,
    merge_all,
    tally,
)
from jaxmet.tree.batches import Batches

SAMPLES = 2**16  # values of a node and batch that are counted
Counts = tuple[np.ndarray, np.ndarray]


def countable(node: Node) -> bool:
    """Whether a node makes numbers in every batch: none in a branch or `while_loop`."""
    inside = {"while", "cond"} & set(node.region)
    return (
        not inside
        and node.kind != "output"
        and node.function not in ("integers", "complex")
    )


def activations(
    params: Any, graph: Graph, batches: Batches, names: Collection[str], caller: str
) -> dict[str, Counts]:
    """Counts and edges of the results of these nodes over all batches, layers together."""
    layout: list[tuple[str, int]] = []
    seen: Histogram = collect(
        graph,
        params,
        batches,
        _tallied(names),
        merge,
        caller=caller,
        progress=False,
        observer=_side_by_side(graph, layout),
    )
    counts, edges = (np.asarray(v, np.float64) for v in (seen.counts, seen.edges))
    found, start = {}, 0
    for name, layers in layout:
        rows = slice(start, start + layers)
        found[name] = counts[start], edges[start]
        if layers > 1:
            one = merge_all(jax.tree.map(lambda v, rows=rows: v[rows], seen))
            found[name] = np.asarray(one.counts, np.float64), np.asarray(one.edges)
        start += layers
    return found


def _tallied(names: Collection[str]) -> Callable:
    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        if node.name not in names or not jnp.issubdtype(result.dtype, jnp.inexact):
            return result, None
        return result, tally(result.astype(jnp.float32), SAMPLES)

    return hook


def _side_by_side(graph: Graph, layout: list[tuple[str, int]]) -> Observer:
    """One histogram with one row per node and layer: few arrays for a whole model."""

    def observer(hook: Hook) -> Callable:
        run = statistics_of(graph)(hook)

        def counted(params: Any, *batch: Any, **kwargs: Any) -> Histogram:
            seen = {
                k: v
                for k, v in run(params, *batch, **kwargs).items()
                if isinstance(v, Tally)
            }
            layout[:] = [(name, int(t.low.size)) for name, t in seen.items()]
            return histograms(list(seen.values()))

        return counted

    return observer
