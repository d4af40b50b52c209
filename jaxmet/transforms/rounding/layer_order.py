"""Layers in the order in which they can be rounded: side by side where none waits for another."""

import dataclasses
from collections.abc import Sequence

from jaxmet.engine.graph.graph import Graph
from jaxmet.transforms.rounding.rounded_layers import Layer


@dataclasses.dataclass(frozen=True)
class Wave:
    """Layers of which none reads what another makes, and the node after which to cut.

    Those of one loop are all in one wave: what runs between its layers cannot be cut.
    """

    layers: tuple[Layer, ...]
    cut: str | None


def find_waves(graph: Graph, layers: Sequence[Layer]) -> tuple[Wave, ...]:
    """All layers that can be rounded, in waves; the last one may need no cut."""
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    reads = _reads(graph)
    waves: list[Wave] = []
    current: list[Layer] = []
    for layer in (one for one in layers if one.why is None):
        if current and _waits(layer, current, reads):
            cut = _cut(graph, order, current, layer)
            if cut is not None:
                waves.append(Wave(tuple(current), cut))
                current = []
        current.append(layer)
    if current:
        waves.append(Wave(tuple(current), _cut(graph, order, current, None)))
    return tuple(waves)


def _reads(graph: Graph) -> dict[str, frozenset[str] | None]:
    """The nodes that each node depends on; None where that is not known."""
    found: dict[str, frozenset[str] | None] = {}
    for node in graph.nodes:
        every: set[str] | None = set()
        for edge in node.inputs:
            before = found.get(edge.node) if edge.node is not None else None
            if edge.node is None or edge.node not in found or before is None:
                every = None
                break
            assert every is not None
            every |= {edge.node, *before}
        unknown = every is None and node.kind != "input"
        found[node.name] = None if unknown else frozenset(every or ())
    return found


def _waits(
    layer: Layer, current: Sequence[Layer], reads: dict[str, frozenset[str] | None]
) -> bool:
    if (
        layer.loops
        and current[-1].loops
        and layer.node.region == current[-1].node.region
    ):
        return False
    before = reads[layer.node.name]
    return before is None or any(one.node.name in before for one in current)


def _cut(
    graph: Graph,
    order: dict[str, int],
    current: Sequence[Layer],
    following: Layer | None,
) -> str | None:
    """The first node outside of loops, not before the last layer, but before the next."""
    first = max(order[one.node.name] for one in current)
    last = order[following.node.name] if following is not None else len(graph.nodes)
    for node in graph.nodes[first:last]:
        if not node.loops and node.kind not in ("input", "output"):
            return node.name
    return None
