r"""Grids through a fold: those of weights follow their gain, or quantize what is folded.

With scales $s_o$ a channel, $Q_s(W)\,g = Q_{s|g|}(W g)$: a weight that was trained on its
grid beside a norm stays on it when the norm's gain $g$ moves into it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmet.engine.graph import Graph
from jaxmet.numerics.norm import SMALLEST, norm_gain
from jaxmet.transforms.fold.plans import plan_of, spread
from jaxmet.transforms.stored import check_stored, roles_of, statistics_weight
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers


def pinned_weights(quantizers: Quantizers | None) -> set[str]:
    """The parameters whose grids do not follow them."""
    if quantizers is None:
        return set()
    return {n for n, q in quantizers.weights.items() if not (q.follows or q.product)}


def fold_grids(
    quantizers: Quantizers, gains: Mapping[str, jax.Array], caller: str
) -> Quantizers:
    """The quantizers with every pinned weight scale multiplied by the gain that moved."""
    weights = dict(quantizers.weights)
    for name in sorted(pinned_weights(quantizers) & gains.keys()):
        weights[name] = _scaled(name, weights[name], gains[name], caller)
    return dataclasses.replace(quantizers, weights=weights)


def _scaled(name: str, quantizer: Quantizer, gain: jax.Array, caller: str) -> Quantizer:
    scale, zero_point = quantizer.grid(None)
    fits = scale.ndim == gain.ndim and all(
        n in (1, m) for n, m in zip(gain.shape, scale.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"jaxmet.{caller}: the scale of {name!r} has shape {scale.shape} and the gain "
            f"that folds into it {gain.shape}, so no scale can follow it. Quantize with one "
            "scale an output channel (per_channel=True), train with simulate(…, fold=graph), "
            "or leave the norm alone with graph.without."
        )
    low, high = quantizer.ends
    zero_point = jnp.where(gain < 0, low + high - zero_point, zero_point)
    zero_point = jnp.zeros_like(scale) if quantizer.symmetric else zero_point
    # A gain of zero leaves only zeros to quantize, which any scale does.
    size = jnp.where(gain == 0, 1.0, jnp.abs(gain)).astype(scale.dtype)
    held = quantizer.holding(scale * size, zero_point)
    least = quantizer.least
    return held if least is None else dataclasses.replace(held, least=least * size)


def gains_of(
    graph: Graph, leaves: Mapping[str, Any], caller: str
) -> dict[str, jax.Array]:
    r"""By parameter, the gain $\gamma/\sqrt{\sigma^2+\varepsilon}$ that folding would put into it.

    No gradient goes through $\sigma^2$, which is data of a norm in training.
    """
    found: dict[str, jax.Array] = {}
    for node in graph.nodes:
        if node.kind != "norm" or node.norm is None:
            continue
        plan = plan_of(graph, node)
        check_stored(node, leaves, caller, where=" of fold=")
        if plan.why is not None:
            continue
        roles = {role: leaves[name] for role, name in roles_of(node.norm).items()}
        scale = roles.get("scale")
        variance = lax.stop_gradient(jnp.asarray(dense(roles["variance"])))
        scale = None if scale is None else jnp.asarray(dense(scale))
        weight = statistics_weight(node.norm, leaves, variance.dtype)
        variance = variance * weight
        gain = norm_gain(variance, scale, node.norm.epsilon).reshape(plan.sizes)
        for place in plan.places:
            kernel = dense(leaves[place.parameter])
            factor = spread(gain, place, kernel.shape)
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
        wide[name] = _times(leaves[name], gain)
    rounded = quantize(wide)
    for name, gain in gains.items():
        faint = jnp.abs(gain) < SMALLEST
        back = _times(rounded[name], 1.0 / jnp.where(faint, 1.0, gain))
        rounded[name] = _where(faint, leaves[name], back)
    return rounded


def _times(leaf: Any, factor: jax.Array) -> Any:
    array = jnp.asarray(dense(leaf))
    return with_weight(leaf, (array.astype(factor.dtype) * factor).astype(array.dtype))


def _where(faint: jax.Array, leaf: Any, other: Any) -> Any:
    kept = jnp.asarray(dense(leaf))
    shape = jnp.broadcast_to(faint, kept.shape)
    return with_weight(other, jnp.where(shape, kept, dense(other)))
