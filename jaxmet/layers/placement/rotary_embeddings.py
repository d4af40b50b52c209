"""Rotary position embeddings: x·cos + r(x)·sin, of which only the sum is worth a quantizer.

A rotation is one operation. Its two products are added at once, cosines and sines are tables,
and an angle of 8 bits would turn late tokens by as much as their distance.

Su et al., [RoFormer: Enhanced Transformer with Rotary Position
Embedding](https://arxiv.org/abs/2104.09864), 2021, section 3.4.2.
"""

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node

TABLES = ("cos", "sin", "integers")
"""What a table is: a cosine, a sine, or what positions look up in constants."""


def inside_rotations(graph: Graph) -> frozenset[str]:
    """The products of rotations, and what only their tables are computed from."""
    found: set[str] = set()
    for node in graph.nodes:
        found |= _products(graph, node)
    tables = {
        e.node
        for name in found
        for e in graph[name].inputs
        if e.node is not None and _is_table(graph, e)
    }
    for node in reversed(graph.nodes):
        consumers = {n.name for n in graph.consumers(node.name)}
        before = not node.is_layer and bool(consumers & tables)
        if (node.name in tables or before) and consumers <= found:
            tables.add(node.name)
            found.add(node.name)
    return frozenset(found)


def _products(graph: Graph, total: Node) -> set[str]:
    """The two products of one number each with a table that a node adds, or none."""
    names = [e.node for e in total.inputs]
    if total.kind != "add" or len(names) != 2 or None in names:
        return set()
    parts = [graph[name] for name in names if name is not None]
    if any(p.kind != "multiply" or graph.consumers(p.name) != (total,) for p in parts):
        return set()
    sources: set[str | None] = set()
    for part in parts:
        tables = [e for e in part.inputs if _is_table(graph, e)]
        values = {_source(graph, e) for e in part.inputs if not _is_table(graph, e)}
        if len(tables) != 1 or len(values) != 1:
            return set()
        sources |= values
    if len(sources) != 1 or None in sources:
        return set()
    return {p.name for p in parts}


def _is_table(graph: Graph, edge: Edge) -> bool:
    return edge.node is not None and graph[edge.node].function in TABLES


def _source(graph: Graph, edge: Edge) -> str | None:
    """The node that a number is from, through the halves that are joined the other way round."""
    if edge.node is None or graph[edge.node].kind != "concat":
        return edge.node
    halves = {e.node for e in graph[edge.node].inputs}
    return halves.pop() if len(halves) == 1 else edge.node
