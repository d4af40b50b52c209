"""Histograms of activations, in one pass over the data."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.collect import collect
from jaxmet.layers.observed_ranges import entries_of, merge_rows
from jaxmet.layers.placement.transformed_inputs import transformed_inputs
from jaxmet.numerics.histogram import merge_all, tally
from jaxmet.tree.batches import Batches
from jaxmet.tree.named_leaves import named_leaves

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
    """Counts and edges of the results of these nodes over all batches, layers together.

    Of what layers divide, those of what enters the first of these layers: what is quantized.
    """
    scaled = transformed_inputs(graph, named_leaves(params))
    at = {n: next((x for x in scaled.get(n, ()) if x != n), n) for n in names}
    seen = collect(
        graph,
        params,
        batches,
        _tallied(at),
        merge_rows,
        caller=caller,
        progress=False,
        summary=entries_of,
        key=("counts", frozenset(at.items())),
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


def _tallied(at: Mapping[str, str]) -> Callable:
    """A hook that counts, by name, results of nodes, or what enters the layer that it says."""
    wanted: dict[str, list[str]] = {}
    for name, layer in at.items():
        wanted.setdefault(layer, []).append(name)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result, found = run(*operands), {}
        for name in wanted.get(node.name, ()):
            value = result if name == node.name else operands[0]
            if jnp.issubdtype(value.dtype, jnp.inexact):
                found[name] = tally(value.astype(jnp.float32), SAMPLES)
        return result, found or None

    return hook
