"""Values that 8 bits cannot hold: residual streams, and what norms over the data hand on.

A transformer adds the results of its blocks to a stream, in which a few channels are a hundred
times as large as the others, and a norm over the data takes them down again. One scale for all
of a stream leaves the small channels nothing. Runtimes that compute products in integers add and
normalize in floating point: what they quantize is what enters the next product.
"""

from collections.abc import Collection, Mapping

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node
from jaxmet.layers.placement.target_rules import KEEPS_GRID, VIEWS
from jaxmet.tree.config_fields import Settings

CARRIES = ("add", "multiply", "concat", "pool")
"""What a stream goes through on its way to a norm."""

SAME = (1.0, 0.0)
STREAM = "a residual stream: it stays in float (residual_bits)"
DYNAMIC = "only what enters a product has a range that is found at every call (dynamic)"
UNREAD = "a norm over the data that no product reads: it stays in float (residual_bits)"


def is_data_norm(node: Node) -> bool:
    """Whether a node normalizes by statistics of each example: layer norm, RMS norm and others."""
    return node.norm is not None and node.norm.over == "data"


def residual_streams(graph: Graph) -> frozenset[str]:
    """The sums that a norm over the data reads, sums of those, and all that is added in them."""
    found = {
        n.name
        for n in graph.nodes
        if n.kind in CARRIES and any(map(is_data_norm, graph.consumers(n.name)))
    }
    queue = list(found)
    while queue:
        node = graph[queue.pop()]
        new = {e.node for e in node.inputs if e.node is not None}
        if node.kind == "add":  # what is added to a stream is a stream, up to its end
            new |= {r.name for r in graph.consumers(node.name) if r.kind == "add"}
        queue += [n for n in new - found if graph[n].kind in CARRIES]
        found |= new
    return frozenset(found)


def entering(
    graph: Graph, names: Collection[str], settings: Mapping[str, Settings]
) -> frozenset[str]:
    """Which of these values can be quantized at the products that read them, and only there.

    All that an operand may come from is quantized in the same way then, and of a loop it is
    known which of its turns each is from.
    """
    found = {name for name in names if name in settings}
    before = -1
    while before != len(found):
        before = len(found)
        for name in sorted(found):
            if not _enters(graph, name, found, settings):
                found.discard(name)
    return frozenset(found)


def _enters(
    graph: Graph, name: str, found: Collection[str], settings: Mapping[str, Settings]
) -> bool:
    node, read = graph[name], False
    if node.loops not in ((), ("scan",)) and not settings[name].at_products:
        return False
    for consumer in graph.consumers(name):
        if consumer.function in KEEPS_GRID:  # products after it read this grid
            return False
        if not consumer.is_product:
            continue
        operands = {e.operand for e in consumer.inputs if e.node == name}
        for edge in consumer.inputs:
            if edge.operand not in operands:
                continue
            read = True
            if edge.node is None or edge.node not in found:
                return False
            plain = settings[name].at_products or _is_plain(graph, consumer, edge)
            if not plain or settings[edge.node] != settings[name]:
                return False
    return read


def _is_plain(graph: Graph, consumer: Node, edge: Edge) -> bool:
    """Whether an operand has the numbers of the node, of a turn that is known."""
    assert edge.node is not None
    if edge.affine != SAME or not all(m in VIEWS for m in edge.moves):
        return False
    source = graph[edge.node]
    inside = edge.turn in ("same", "previous") and source.region == consumer.region
    return not source.loops or inside or edge.turn == "last"
