"""Where the mean error of a site can be taken back: its bias, or that of its norm."""

import dataclasses
from collections.abc import Sequence

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.tree.quantizers import Quantizers


@dataclasses.dataclass(frozen=True)
class BiasParameter:
    """A site, the node at which its mean is kept and the parameter that keeps it.

    `why` says instead why there is none.
    """

    site: Node
    at: str = ""
    into: str = ""
    why: str | None = None


def find_places(graph: Graph, quantizers: Quantizers) -> tuple[BiasParameter, ...]:
    """One place a site, in the order in which they run.

    Raises ValueError for a site that `graph.only` named and that has none.
    """
    places = tuple(_place(graph, quantizers, site) for site in graph.sites)
    for place in places:
        name = place.site.name
        if place.why is not None and name in graph.named:
            raise ValueError(
                f"jaxmet.correct_bias: site {name!r} cannot be corrected: {place.why}. "
                f"Leave it out: graph.without({name!r})."
            )
    return places


def _place(graph: Graph, quantizers: Quantizers, site: Node) -> BiasParameter:
    why = _unfit(quantizers, site)
    if why is not None:
        return BiasParameter(site, why=why)
    if site.bias is not None and site.bias not in site.shared:
        return BiasParameter(site, site.name, site.bias)
    lacking = "no bias"
    if site.bias is not None:
        lacking = f"its bias {site.bias!r} is used elsewhere too"
    elif site.derived_bias:
        lacking = "its bias is computed from parameters"
    norm, why = _norm_behind(graph, site)
    if norm is None or norm.norm is None:
        return BiasParameter(site, why=f"{lacking}, and {why}")
    return BiasParameter(site, norm.name, norm.norm.bias or "")


def _unfit(quantizers: Quantizers, site: Node) -> str | None:
    """Why a site is not corrected, whatever parameters it has."""
    if site.loops:
        return f"inside a {site.loops[-1]}"
    derived = site.weight is not None and site.weight.name is None
    why = None if derived and site.kind == "product" else site.why_kept()
    if why is not None:
        return why
    assert site.weight is not None
    quantizer = quantizers.weights.get(site.weight.name or site.name)
    if quantizer is None or not quantizer.active:
        return "its weight is not quantized"
    return None


def _norm_behind(graph: Graph, site: Node) -> tuple[Node | None, str]:
    """The norm that alone reads a site and has a bias to spare, or why there is none."""
    readers = site.only_readers or ()
    node = graph[readers[0]] if len(readers) == 1 else None
    if node is None or node.norm is None:
        return None, "no norm alone reads it"
    norm = node.norm
    if norm.over not in ("stored", "constant") or not norm.plain:
        return None, f"the norm {node.name!r} behind it has no fixed statistics"
    if norm.bias is None:
        return None, f"the norm {node.name!r} behind it has no bias either"
    if norm.bias in node.shared:
        return None, f"{norm.bias!r} is used elsewhere too"
    if node.name not in graph.selected:
        return None, f"the norm {node.name!r} behind it is not selected"
    return node, ""


def fits(shape: Sequence[int], features: Sequence[int]) -> bool:
    """Whether a parameter holds one number for each of what a site makes."""
    return [n for n in shape if n != 1] == [n for n in features if n != 1]
