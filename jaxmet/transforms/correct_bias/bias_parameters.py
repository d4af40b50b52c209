"""Where the mean error of a layer can be taken back: its bias, or that of its norm."""

import dataclasses
from collections.abc import Sequence

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.tree.quantizers import Quantizers


@dataclasses.dataclass(frozen=True)
class BiasParameter:
    """A layer, the node at which its mean is kept and the parameter that keeps it.

    `why` says instead why there is none.
    """

    layer: Node
    at: str = ""
    into: str = ""
    why: str | None = None


def find_places(graph: Graph, quantizers: Quantizers) -> tuple[BiasParameter, ...]:
    """One place per layer, in the order in which they run.

    Raises ValueError for a layer that `graph.only` named and that has none.
    """
    places = tuple(_place(graph, quantizers, layer) for layer in graph.layers)
    for place in places:
        name = place.layer.name
        if place.why is not None and name in graph.named:
            raise ValueError(
                f"jaxmet.correct_bias: layer {name!r} cannot be corrected: {place.why}. "
                f"Leave it out: graph.without({name!r})."
            )
    return places


def _place(graph: Graph, quantizers: Quantizers, layer: Node) -> BiasParameter:
    why = _unfit(quantizers, layer)
    if why is not None:
        return BiasParameter(layer, why=why)
    if layer.bias is not None and layer.bias not in layer.shared:
        return BiasParameter(layer, layer.name, layer.bias)
    lacking = "no bias"
    if layer.bias is not None:
        lacking = f"its bias {layer.bias!r} is used elsewhere too"
    elif layer.derived_bias:
        lacking = "its bias is computed from parameters"
    norm, why = _norm_after(graph, layer)
    if norm is None or norm.norm is None:
        return BiasParameter(layer, why=f"{lacking}, and {why}")
    return BiasParameter(layer, norm.name, norm.norm.bias or "")


def _unfit(quantizers: Quantizers, layer: Node) -> str | None:
    """Why a layer is not corrected, whatever parameters it has."""
    if layer.loops:
        return f"inside a {layer.loops[-1]}"
    derived = layer.weight is not None and layer.weight.name is None
    why = None if derived and layer.kind == "product" else layer.why_kept()
    if why is not None:
        return why
    assert layer.weight is not None
    quantizer = quantizers.weights.get(layer.weight.name or layer.name)
    if quantizer is None or not quantizer.active:
        return "its weight is not quantized"
    return None


def _norm_after(graph: Graph, layer: Node) -> tuple[Node | None, str]:
    """The norm that alone reads a layer and has a bias to spare, or why there is none."""
    consumers = layer.only_consumers or ()
    node = graph[consumers[0]] if len(consumers) == 1 else None
    if node is None or node.norm is None:
        return None, "no norm alone reads it"
    norm = node.norm
    if norm.over not in ("stored", "constant") or not norm.plain:
        return None, f"the norm {node.name!r} after it has no fixed statistics"
    if norm.bias is None:
        return None, f"the norm {node.name!r} after it has no bias either"
    if norm.bias in node.shared:
        return None, f"{norm.bias!r} is used elsewhere too"
    if node.name not in graph.selected:
        return None, f"the norm {node.name!r} after it is not selected"
    return node, ""


def fits(shape: Sequence[int], features: Sequence[int]) -> bool:
    """Whether a parameter holds one number for each of what a layer makes."""
    return [n for n in shape if n != 1] == [n for n in features if n != 1]
