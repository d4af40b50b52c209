r"""Weights as a fold would leave them: the gains that norms put into them, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import lax

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.folds.fold_plans import plan_of
from jaxmet.layers.folds.norm_parameters import (
    check_stored,
    roles_of,
    statistics_weight,
)
from jaxmet.layers.leaf_math import scaled
from jaxmet.numerics import xp
from jaxmet.numerics.norm import SMALLEST, norm_gain
from jaxmet.numerics.xp import Array
from jaxmet.tree.leaves import dense, with_weight


def gains_of(graph: Graph, leaves: Mapping[str, Any], caller: str) -> dict[str, Array]:
    r"""By parameter, the gain $\gamma/\sqrt{\sigma^2+\varepsilon}$ that folding would put into it.

    No gradient goes through $\sigma^2$, which is data of a norm in training.
    """
    found: dict[str, Array] = {}
    for node in graph.nodes:
        if node.kind != "norm" or node.norm is None:
            continue
        plan = plan_of(graph, node)
        check_stored(node, leaves, caller, where=" of fold=")
        if plan.why is not None:
            continue
        roles = {role: leaves[name] for role, name in roles_of(node.norm).items()}
        scale = roles.get("scale")
        variance = lax.stop_gradient(xp.asarray(dense(roles["variance"])))
        scale = None if scale is None else xp.asarray(dense(scale))
        weight = statistics_weight(node.norm, leaves, variance.dtype)
        variance = variance * weight
        gain = norm_gain(variance, scale, node.norm.epsilon).reshape(plan.sizes)
        for place in plan.places:
            kernel = dense(leaves[place.parameter])
            factor = place.spread(gain, kernel.shape)
            found[place.parameter] = found.get(place.parameter, 1.0) * factor
        if plan.side == "before" and node.norm.mean is not None:
            # It follows its tensor, and an int32 bias is a sum with it.
            found[node.norm.mean] = gain.reshape(leaves[node.norm.mean].shape)
    return found


def folded_and_back(
    graph: Graph,
    leaves: Mapping[str, Any],
    quantize: Callable[[Mapping[str, Any]], dict[str, Any]],
    caller: str,
) -> dict[str, Any]:
    r"""Leaves as `quantize` would leave them folded: $Q(W g)/g$, where $g$ is no zero."""
    gains = gains_of(graph, leaves, caller)
    wide = dict(leaves)
    for name, gain in gains.items():
        wide[name] = scaled(leaves[name], gain)
    rounded = quantize(wide)
    for name, gain in gains.items():
        faint = xp.abs(gain) < SMALLEST
        back = scaled(rounded[name], 1.0 / xp.where(faint, 1.0, gain))
        rounded[name] = _where(faint, leaves[name], back)
    return rounded


def _where(faint: Array, leaf: Any, other: Any) -> Any:
    kept = xp.asarray(dense(leaf))
    shape = xp.broadcast_to(faint, kept.shape)
    return with_weight(other, xp.where(shape, kept, dense(other)))
