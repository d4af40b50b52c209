"""What norms tell of a whole tree: moments of nodes and of the inputs of products."""

from collections.abc import Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.channels import Tensor
from jaxmet.layers.moments.moment_network import MomentNetwork
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.moments import N_SIGMA, Moments


def node_moments(
    graph: Graph, params: Any, *, n_sigma: float = N_SIGMA
) -> dict[str, Moments]:
    """Moments of each node's result by channel, for the nodes that statistics reach.

    Ranges are `n_sigma` standard deviations of the normal values to either side, taken
    through what follows. Concatenated channels stand in the order of their parts.
    """

    def solve(leaves: Mapping[str, Any]) -> dict[str, Moments]:
        known = MomentNetwork(graph, leaves, n_sigma).known
        return {n: _in_a_row(t) for n, t in known.items() if not isinstance(t, str)}

    return run_once(solve, _arrays(params, graph))


def input_moments(
    graph: Graph, params: Any, *, n_sigma: float = N_SIGMA, implied: bool = False
) -> dict[str, Moments]:
    """Moments of each product's inputs, in the order of its weight's input axis.

    Of a grouped convolution these are the inputs of all groups, one after the other. With
    `implied`, inputs that statistics do not reach (those of the model) are taken to be what
    would make the outputs that a norm tells of.
    """

    def solve(leaves: Mapping[str, Any]) -> dict[str, Moments]:
        network = MomentNetwork(graph, leaves, n_sigma)
        products = [n for n in graph.nodes if n.kind == "product"]
        found = {n.name: network.into(n) for n in products}
        for node in products if implied else ():
            if isinstance(found[node.name], str):
                found[node.name] = network.implied(node)
        return {name: x for name, x in found.items() if not isinstance(x, str)}

    return run_once(solve, _arrays(params, graph))


def unreached(graph: Graph, params: Any) -> dict[str, str]:
    """The layers whose inputs no norm's statistics reach, and why."""
    found: dict[str, str] = {}

    def look(leaves: Mapping[str, Any]) -> None:
        network = MomentNetwork(graph, leaves)
        every = {n.name: network.into(n) for n in graph.layers}
        found.update({name: x for name, x in every.items() if isinstance(x, str)})

    run_once(look, _arrays(params, graph))
    return found


def _arrays(params: Any, graph: Graph) -> dict[str, Any]:
    leaves = graph.leaves(params, "statistics")
    return {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "dtype")}


def _in_a_row(tensor: Tensor) -> Moments:
    return Moments(*(xp.concatenate(v) for v in zip(*tensor.values(), strict=True)))
