"""May a layer or a norm be changed, and if not, why: one wording of each reason.

A reason is a clause about the node itself; `of` says it of another node. What the equations
alone forbid, the graph says: `Node.why_kept` of a weight, `Norm.why_kept` of a norm.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node, used_elsewhere
from jaxmet.tree.quantizers import Quantizers

NOT_SELECTED = "not selected"
NOT_QUANTIZED = "its weight is not quantized"
NO_BIAS = "no bias"
DERIVED_BIAS = "its bias is computed from parameters"
NO_CARRIER = "no single product can carry its bounds"
SEVERAL_AXES = "its channels run along several axes"


def of(name: str, why: str | None) -> str | None:
    """A reason that another node gives, with its name; None for none."""
    return why and f"{name}: {why}"


def why_outside(graph: Graph, *names: str) -> str | None:
    """Why nodes may not be changed together: the first of them that is not selected."""
    outside = (of(name, NOT_SELECTED) for name in names if name not in graph.selected)
    return next(outside, None)


def why_looped(
    node: Node, loops: Collection[str] = ("scan", "while", "cond")
) -> str | None:
    """The innermost loop or branch around a node: it may run more than once, or never."""
    inside = [region for region in node.region if region in loops]
    return f"inside a {inside[-1]}" if inside else None


def why_shared(node: Node, parameters: Collection[str] | None = None) -> str | None:
    """Why a node's parameters, or these of them, would change something else too."""
    shared = [p for p in node.shared if parameters is None or p in parameters]
    return used_elsewhere(shared[0]) if shared else None


def why_unquantized(node: Node, quantizers: Quantizers) -> str | None:
    """Why no error comes from the weight of a layer."""
    name = (node.weight and node.weight.name) or node.name
    quantizer = quantizers.weights.get(name)
    return None if quantizer is not None and quantizer.active else NOT_QUANTIZED


def why_no_matrix(node: Node) -> str | None:
    """Why a layer is no product of matrices, None where it is."""
    if node.convolution is not None:
        spread = node.convolution.batch_groups != 1
        return "its batch is split into groups" if spread else None
    return None if node.dot is not None else node.why_kept()


def why_frozen(node: Node) -> str | None:
    """Why weight and bias of a product may not be changed for this use alone."""
    return why_looped(node) or node.why_kept() or why_shared(node)


# Notes and refusals


def skipped(why: str | None) -> str | None:
    """The note of a report."""
    return why and f"skipped: {why}"


def check_named(
    name: str,
    why: str | None,
    graph: Graph,
    caller: str,
    cannot: str,
    *,
    asked: Collection[str] = (),
    others: Iterable[str] = (),
    cure: str = "",
) -> None:
    """Raise where a node is skipped that was asked for by name.

    Args:
        name: the node.
        why: the reason why it is skipped; None where it is not.
        graph: whose `only` may have named it.
        caller: the function that is called.
        cannot: what cannot be done with it, such as 'be folded'.
        asked: names that were asked for in another way than by `graph.only`; default none.
        others: nodes that go with it, and that may have been named in its place.
        cure: what to do; default: to leave the node out.

    Raises:
        ValueError: for such a node.

    >>> check_named("bn", "a norm over the data", graph, "fold_batch_norm", "be folded")
    """
    named = {name, *others} & {*graph.named, *asked}
    if why is None or not named:
        return
    node = graph[name]
    kind = "layer" if node.is_layer else node.kind
    which = "It" if name in named else repr(min(named))
    cure = cure or f"Leave it out: graph.without({name!r})."
    raise ValueError(
        f"jaxmet.{caller}: {kind} {name!r} cannot {cannot}: {why}. {which} was asked for by "
        f"name. {cure}"
    )


def check_floats(
    leaves: Mapping[str, Any],
    parameters: Iterable[str | None],
    caller: str,
    node: str,
    before: str,
) -> None:
    """Raise where a parameter that has to change with a node is missing or an integer.

    Args:
        leaves: the leaves of the tree by name.
        parameters: the names of these parameters; None for one that the node does not have.
        caller: the function that is called.
        node: the node whose channels they follow.
        before: what has to be done first, such as 'Equalize'.

    Raises:
        ValueError: for such a parameter.

    >>> check_floats(leaves, ["bn/mean"], "equalize", "conv", "Equalize")
    """
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter not in leaves:
            raise ValueError(
                f"jaxmet.{caller}: the tree has no {parameter!r}, which has to follow the "
                f"channels of {node!r}. Pass the whole variables that the graph was traced "
                "with ({'params': …, 'batch_stats': …}), not the trained parameters alone."
            )
        if not jnp.issubdtype(leaves[parameter].dtype, jnp.floating):
            raise ValueError(
                f"jaxmet.{caller}: {parameter!r} has dtype {leaves[parameter].dtype}. "
                f"{before} the float tree, before its weights become integers."
            )
