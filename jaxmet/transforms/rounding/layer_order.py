"""Layers in the order in which they can be rounded: side by side where none waits for another."""

import dataclasses
import itertools
from collections.abc import Sequence

from jaxmet.engine.graph.graph import Graph
from jaxmet.transforms.rounding.rounded_layers import Layer


@dataclasses.dataclass(frozen=True)
class Wave:
    """The layers of one piece of the model, in `parts` of which none reads its own results.

    A piece ends after the node `cut`; with None it ends where a loop begins or ends, or with
    the model. What a loop runs is a piece of its own, and has one part after the other in
    each turn; another piece has one part, which is empty where a loop begins it all.
    """

    parts: tuple[tuple[Layer, ...], ...]
    cut: str | None = None
    loops: bool = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those of all parts."""
        return tuple(layer for part in self.parts for layer in part)

    @property
    def turns(self) -> int:
        """How often each of its layers is rounded: once in each turn of a loop."""
        turns = self.layers[0].node.layers if self.loops else 1
        assert turns is not None
        return turns


def find_waves(graph: Graph, layers: Sequence[Layer]) -> tuple[Wave, ...]:
    """All layers that can be rounded, in waves; the last one may need no cut."""
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    reads = _reads(graph)
    fit = (one for one in layers if one.why is None)
    waves: list[Wave] = []
    loop: int | None = None
    for loop, run in itertools.groupby(fit, key=lambda one: one.node.loop):
        if loop is not None:
            if not waves or waves[-1].loops:
                waves.append(Wave(((),)))  # what runs before the loop
            waves.append(Wave(_parts(tuple(run), reads), loops=True))
        else:
            waves += _plain(graph, order, tuple(run), reads)
    if waves and loop is None:
        cut = _cut(graph, order, waves[-1].layers, None)
        waves[-1] = dataclasses.replace(waves[-1], cut=cut)
    return tuple(waves)


Reads = dict[str, frozenset[str] | None]


def _plain(
    graph: Graph, order: dict[str, int], layers: Sequence[Layer], reads: Reads
) -> list[Wave]:
    """Waves of layers that no loop runs; nothing says yet how the last one ends."""
    waves: list[Wave] = []
    current: list[Layer] = []
    for layer in layers:
        if current and _waits(layer, current, reads):
            cut = _cut(graph, order, current, layer)
            if cut is not None:
                waves.append(Wave((tuple(current),), cut))
                current = []
        current.append(layer)
    return [*waves, Wave((tuple(current),))]


def _parts(layers: Sequence[Layer], reads: Reads) -> tuple[tuple[Layer, ...], ...]:
    """The layers of a loop as they follow each other in one turn."""
    parts: list[list[Layer]] = [[]]
    for layer in layers:
        if parts[-1] and _waits(layer, parts[-1], reads):
            parts.append([])
        parts[-1].append(layer)
    return tuple(map(tuple, parts))


def _reads(graph: Graph) -> Reads:
    """The nodes that each node depends on; None where that is not known.

    What a loop carries from one turn to the next is known before the turn.
    """
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    found: Reads = {}
    for i, node in enumerate(graph.nodes):
        every: set[str] | None = set()
        for edge in node.inputs:
            if node.loops == ("scan",) and order.get(edge.node or "", -1) >= i:
                continue  # of the turn before
            before = found.get(edge.node) if edge.node is not None else None
            if edge.node is None or edge.node not in found or before is None:
                every = None
                break
            assert every is not None
            every |= {edge.node, *before}
        unknown = every is None and node.kind != "input"
        found[node.name] = None if unknown else frozenset(every or ())
    return found


def _waits(layer: Layer, current: Sequence[Layer], reads: Reads) -> bool:
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
