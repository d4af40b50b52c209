"""Caches: inputs that a model returns with new values in some of their places.

A decoder writes the keys and values of new tokens into a cache and reads all of it. What is
stored has one scale, that of what is written: an empty cache says nothing about the range.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node
from jaxmet.layers.placement.target_rules import WRITES, grid_source, keeps_grid


class Cache(NamedTuple):
    """An input, the nodes whose values are written into it, and how loops read it.

    `written` is in the order in which they run. `sliced` says that a loop over layers reads one
    slice of it for each layer.
    """

    name: str
    written: tuple[str, ...]
    sliced: bool


def caches(graph: Graph) -> list[Cache]:
    """The inputs into which values are written, each with the nodes that make these."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        for edges in _operands(graph, node):
            old = {e.node for e in edges if e.node and _is_data(graph[e.node])}
            new = {grid_source(graph, e.node) for e in edges if e.node} - old
            if new and all(map(keeps_grid, edges)):
                for name in old:
                    found.setdefault(name, set()).update(new)
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    return [
        Cache(name, tuple(sorted(new, key=order.__getitem__)), _is_sliced(graph, name))
        for name, new in found.items()
    ]


def _operands(graph: Graph, node: Node) -> Iterator[list[Edge]]:
    """Where several values were written into one: an operand, or what the model returns."""
    operands: dict[int, list[Edge]] = {}
    for edge in node.inputs:
        operands.setdefault(edge.operand, []).append(edge)
    for edges in operands.values():
        joined = [graph[e.node] for e in edges if e.node and _joins(graph, e)]
        if node.kind == "output":
            yield [*edges, *(e for n in joined for e in n.inputs)]
        elif any(m in WRITES for e in edges for m in e.moves):
            yield edges


def _joins(graph: Graph, edge: Edge) -> bool:
    return edge.node is not None and graph[edge.node].kind == "concat"


def _is_data(node: Node) -> bool:
    return node.kind == "input" and node.function == "values"


def _is_sliced(graph: Graph, name: str) -> bool:
    consumers = [n for n in graph.consumers(name) if n.layers]
    return any(e.turn == "each" for n in consumers for e in n.inputs if e.node == name)
