"""Histograms of activations, in one pass over the data."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.collect import collect
from jaxmet.layers.observed_ranges import merge_rows, rows_of
from jaxmet.numerics.histogram import merge_all, tally
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
    seen = collect(
        graph,
        params,
        batches,
        _tallied(names),
        merge_rows,
        caller=caller,
        progress=False,
        summary=rows_of,
        key=("counts", frozenset(names)),
    )
    found = {}
    for rows in seen.values():
        for name, histogram in rows.by_node().items():
            one = jax.tree.map(jnp.asarray, histogram)
            one = merge_all(one) if one.low.ndim else one
            found[name] = tuple(
                np.asarray(v, np.float64) for v in (one.counts, one.edges)
            )
    return found


def _tallied(names: Collection[str]) -> Callable:
    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        if node.name not in names or not jnp.issubdtype(result.dtype, jnp.inexact):
            return result, None
        return result, tally(result.astype(jnp.float32), SAMPLES)

    return hook
