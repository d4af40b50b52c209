"""Whether quantizers are those of a graph."""

from typing import Any

from jaxmet.engine.graph import Graph
from jaxmet.tree.names import suggestion
from jaxmet.tree.quantizers import Quantizers


def check_quantizers(quantizers: Any, graph: Graph, caller: str) -> None:
    """Refuse what jm.calibrate did not make, or made for another model."""
    if not isinstance(quantizers, Quantizers):
        raise ValueError(
            f"jaxmet.{caller}: the quantizers are of type {type(quantizers).__name__}. "
            "Pass what jm.calibrate returned, after params and graph."
        )
    nodes = {node.name for node in graph.nodes}
    for group, known in (
        (quantizers.weights, nodes | set(graph.parameters)),
        (quantizers.activations, nodes),
    ):
        for name in group:
            if name not in known:
                raise ValueError(
                    f"jaxmet.{caller}: the quantizers have one for {name!r}, which this "
                    f"graph does not have. {suggestion(name, known)} Calibrate again for it."
                )
