"""The values that enter layers that divide them, as values of the node that made them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge


def input_of(layer: str) -> str:
    """What the values that enter a layer are called among those of nodes."""
    return f"input of {layer}"


def entering_values(
    graph: Graph,
    name: str,
    layers: tuple[str, ...],
    found: Mapping[str, Any],
    as_one: Callable[[list[Any]], Any],
) -> Any:
    """The values of a node as they enter these layers, a row for each turn that made them.

    None where nothing was seen. `as_one` makes one of the values of several.
    """
    rows: list[list[Any]] = [[] for _ in range(graph[name].layers or 1)]
    for layer in layers:
        if layer == name and name in found:
            for turn, row in zip(rows, _rows(found[name]), strict=True):
                turn.append(row)
        for edge in graph[layer].inputs if layer != name else ():
            if edge.node == name and input_of(layer) in found:
                entered = _rows(found[input_of(layer)])
                for made, row in _made_in(graph, layer, edge, entered):
                    rows[made].append(row)
    merged = [as_one(row) if row else None for row in rows]
    some = next((row for row in merged if row is not None), None)
    if some is None or not graph[name].layers:
        return some
    none = some._replace(low=np.zeros_like(some.low), high=np.zeros_like(some.high))
    filled = (none if row is None else row for row in merged)
    return jax.tree.map(lambda *v: np.stack(v), *filled)


def turns_made(graph: Graph, layer: str, edge: Edge) -> frozenset[int]:
    """The turns of the source of an edge whose values enter a layer."""
    length = graph[layer].layers or 1
    made = _made_in(graph, layer, edge, [None] * length)
    return frozenset(turn for turn, _ in made)


def _made_in(
    graph: Graph, layer: str, edge: Edge, entered: list[Any]
) -> Iterator[tuple[int, Any]]:
    """What entered a layer by this edge, and the turn of its source that made it."""
    source = graph[edge.node or ""]
    carried = any(
        e.turn == "previous" for e in graph[layer].inputs if e.operand == edge.operand
    )
    if not source.layers:  # a loop begins with it, or reads it in each turn
        first = entered[:1] if carried else entered
        yield from ((0, row) for row in first)
    elif edge.turn == "last":
        yield from ((source.layers - 1, row) for row in entered)
    else:
        yield from enumerate(entered[1:] if edge.turn == "previous" else entered)


def _rows(value: Any) -> list[Any]:
    """The values of each layer, those of one without a loop in one row."""
    ndim, size = np.ndim(value.low), np.size(value.low)
    flat = jax.tree.map(lambda v: v.reshape((-1, *v.shape[ndim:])), value)
    return [jax.tree.map(lambda v, i=i: v[i], flat) for i in range(size)]
