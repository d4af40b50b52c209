"""The quantizers of a network, with the layer that each belongs to."""

from typing import Any, NamedTuple

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.matching import check_quantizers
from jaxmet.tree.checks import check_concrete
from jaxmet.tree.quantizers import Quantizers


class ScoredQuantizer(NamedTuple):
    """One quantizer: its tensor, the node that this belongs to, and how wide it is.

    The width of a `fixed` one follows from others: an int32 bias.
    """

    tensor: str
    layer: str
    kind: str
    bits: int
    fixed: bool
    selected: bool


def places(
    params: Any, graph: Graph, quantizers: Quantizers, caller: str
) -> list[ScoredQuantizer]:
    """All quantizers that are on, weights first, in the order of the network.

    Raises ValueError where there is none, or none that the graph selects, and for a
    graph of the tree and quantizers that do not belong together.
    """
    check_concrete(params, caller)
    check_quantizers(quantizers, graph, caller, params)
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    users = {p: node.name for node in reversed(graph.nodes) for p in node.parameters}
    found = []
    for kind, group in (
        ("weight", quantizers.weights),
        ("activation", quantizers.activations),
    ):
        of_kind = [
            ScoredQuantizer(
                name,
                users.get(name, name),
                kind,
                q.bits,
                q.product is not None,
                users.get(name, name) in graph.selected,
            )
            for name, q in group.items()
            if q.active
        ]
        found += sorted(of_kind, key=lambda p: order.get(p.layer, len(order)))
    if not any(place.selected for place in found):
        raise ValueError(
            f"jaxmet.{caller}: no quantizer of the selected nodes is on. Calibrate with fewer "
            "than 32 bits, or select other nodes."
        )
    return found
