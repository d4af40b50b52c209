"""Where the mean error of a layer can be taken back: its bias, or that of its norm."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node, used_elsewhere
from jaxmet.layers.eligibility import (
    DERIVED_BIAS,
    NO_BIAS,
    NOT_SELECTED,
    check_named,
    of,
    why_looped,
    why_outside,
    why_shared,
    why_unquantized,
)
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
    """One place per layer, in the order in which they run; layers that share a bias have one.

    Raises ValueError for a layer that `graph.only` named and that has none.
    """
    alone = {n.name: _place(graph, quantizers, n) for n in graph.layers}
    places = tuple(_together(graph, alone, place) for place in alone.values())
    for p in places:
        check_named(p.layer.name, p.why, graph, "correct_bias", "be corrected")
    return places


def _place(graph: Graph, quantizers: Quantizers, layer: Node) -> BiasParameter:
    why = _unfit(quantizers, layer)
    if why is not None:
        return BiasParameter(layer, why=why)
    if layer.bias is not None and layer.bias not in layer.shared:
        return BiasParameter(layer, layer.name, layer.bias)
    lacking = NO_BIAS
    if layer.bias is not None:
        lacking = used_elsewhere(layer.bias)
    elif layer.derived_bias:
        lacking = DERIVED_BIAS
    norm, why = _norm_after(graph, layer)
    if norm is not None and norm.norm is not None:
        return BiasParameter(layer, norm.name, norm.norm.bias or "")
    if layer.bias is not None and layer.layer and layer.layer.tied_bias:
        return BiasParameter(layer, layer.name, layer.bias)
    return BiasParameter(layer, why=f"{lacking}; {why}")


def _together(
    graph: Graph, alone: Mapping[str, BiasParameter], place: BiasParameter
) -> BiasParameter:
    """The place, if all layers that share its bias have it as theirs."""
    if place.into not in place.layer.shared:
        return place
    for node in graph.nodes:
        if node.bias != place.into:
            continue
        other = alone.get(node.name)
        why = NOT_SELECTED if other is None else other.why
        if other is not None and why is None and other.into != place.into:
            why = f"corrected at {other.at!r}"
        if why is not None:
            why = f"{used_elsewhere(place.into)}; {of(node.name, why)}"
            return BiasParameter(place.layer, why=why)
    return place


def _unfit(quantizers: Quantizers, layer: Node) -> str | None:
    """Why a layer is not corrected, whatever parameters it has."""
    derived = layer.weight is not None and layer.weight.name is None
    # what is computed from parameters has a mean error too, at its result
    kept = None if derived and layer.kind == "product" else layer.why_kept(shared=True)
    return why_looped(layer) or kept or why_unquantized(layer, quantizers)


def _norm_after(graph: Graph, layer: Node) -> tuple[Node | None, str | None]:
    """The norm that alone reads a layer and has a bias to spare, or why there is none."""
    consumers = layer.only_consumers or ()
    node = graph[consumers[0]] if len(consumers) == 1 else None
    if node is None or node.norm is None:
        return None, "no norm alone reads it"
    norm = node.norm
    kept = None if norm.over == "constant" and norm.plain else norm.why_kept()
    none = NO_BIAS if norm.bias is None else why_shared(node, (norm.bias,))
    why = of(node.name, kept or none) or why_outside(graph, node.name)
    return (node, None) if why is None else (None, why)


def why_unfit(parameter: str, leaf: Any, features: Sequence[int]) -> str | None:
    """Why a parameter cannot hold one number for each of what a layer makes."""
    fits = [n for n in leaf.shape if n != 1] == [n for n in features if n != 1]
    return None if fits else f"{parameter!r} has not one number per channel"
