"""The float model that a quantized one is compared with, where it is another tree."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.calls import Apply
from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.engine.node import Weight
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import dense
from jaxmet.tree.names import named_leaves
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers


def float_model(
    reference: Any, params: Any, graph: Graph, quantizers: Quantizers, caller: str
) -> tuple[Apply, Any]:
    """`(apply, params)` of what counts as float: `reference` where it is given.

    A reference is a tree of the same model, or `(apply, params)` of another. Raises
    ValueError for one whose channels are scaled in another way, so that its values cannot
    be compared with those of `params` node by node.
    """
    if reference is None:
        return graph.apply, params
    apply, tree = graph.apply, reference
    if isinstance(reference, tuple) and len(reference) == 2 and callable(reference[0]):
        apply, tree = reference
    else:
        leaves_of(tree, graph, caller)
    ours, theirs = named_leaves(params), named_leaves(tree)
    for site in graph.sites:
        weight = site.weight
        if weight is None or weight.name not in quantizers.weights:
            continue
        if weight.name in ours and weight.name in theirs:
            _check_scale(weight, ours, theirs, quantizers, caller)
    return apply, tree


def _check_scale(
    weight: Weight,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    quantizers: Quantizers,
    caller: str,
) -> None:
    """Refuse a weight that is not a rounded one of the reference's, but a rescaled one."""
    name = weight.name or ""
    leaves = (ours[name], theirs[name])
    arrays = [dense(leaf) for leaf in leaves]
    if not all(is_concrete(a) and hasattr(a, "shape") for a in arrays):
        return
    new, old = (np.abs(np.asarray(jnp.asarray(a, jnp.float32))) for a in arrays)
    step = _step(new, quantizers.weights[name])
    scaled = new.shape != old.shape
    for axes in (weight.out_axes, weight.in_axes) if not scaled else ():
        rest = tuple(i for i in range(new.ndim) if i not in axes)
        # Rounding moves what is two steps or more by half of it at most.
        known = np.max(np.maximum(new, old) - 2 * step, axis=rest) >= 0
        power = np.sum(old * old, axis=rest)
        known &= power > 0  # a dead channel tells no scale
        ratio = np.sum(new * old, axis=rest)[known] / power[known]
        scaled |= bool(known.any() and np.mean((ratio < 0.5) | (ratio > 2)) > 0.25)
    if scaled:
        raise ValueError(
            f"jaxmet.{caller}: {name!r} of the reference is scaled in another way, so the "
            "two models cannot be compared node by node. Pass the tree from right before "
            "rounding: folded and equalized like this one."
        )


def _step(new: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """The step of a weight's grid, or the largest that it can be."""
    if not quantizer.follows:
        scale = np.asarray(quantizer.grid(None)[0])
        return np.max(scale) if quantizer.block is not None else scale
    rest = tuple(i for i in range(new.ndim) if i not in (quantizer.axis or ()))
    low, high = quantizer.ends
    span = high if quantizer.symmetric else (high - low) / 2
    return np.max(new, axis=rest, keepdims=True) / span
