"""The float model that a quantized one is compared with, where it is another tree."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Weight
from jaxmet.engine.program.calls import Apply
from jaxmet.layers.layer import channel_rows
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import dense, input_signs_of
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.structures import STRUCTURES


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
        graph.leaves(tree, f"{caller}, reference")
    ours, theirs = named_leaves(params), named_leaves(tree)
    for layer in graph.layers:
        weight = layer.weight
        if weight is None or weight.name not in quantizers.weights:
            continue
        if weight.name in ours and weight.name in theirs:
            _check_scale(weight, ours, theirs, quantizers, caller)
    return apply, tree


MOVED = 1.05  # steps: more than rounding to a neighbour does
OTHER = math.log(1.25)  # a channel's typical ratio that training leaves alone
SOME = 0.1  # of the channels


def _check_scale(
    weight: Weight,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    quantizers: Quantizers,
    caller: str,
) -> None:
    """Refuse a weight that is not a rounded or trained one of the reference's, but rescaled."""
    name = weight.name or ""
    leaves = (ours[name], theirs[name])
    arrays = [dense(leaf) for leaf in leaves]
    if not all(is_concrete(a) and hasattr(a, "shape") for a in arrays):
        return
    if any(isinstance(a, STRUCTURES) for a in arrays):
        return
    new, old = (np.asarray(jnp.asarray(a, jnp.float32)) for a in arrays)
    step = _step(np.abs(new), quantizers.weights[name])
    signs = [input_signs_of(leaf) for leaf in leaves]
    scaled = new.shape != old.shape or (signs[0] is None) != (signs[1] is None)
    for axes in (weight.out_axes, weight.in_axes) if not scaled else ():
        scaled |= _is_rescaled(new, old, step, axes)
    if scaled:
        raise ValueError(
            f"jaxmet.{caller}: {name!r} of the reference is scaled in another way, or "
            "rotated, so the two models cannot be compared node by node. Pass the tree from right "
            "before rounding: folded, equalized and rotated like this one."
        )


def _is_rescaled(
    new: np.ndarray, old: np.ndarray, step: Any, axes: tuple[int, ...]
) -> bool:
    """Whether many channels have most of their weights in one ratio to what they were."""
    arrays = (np.broadcast_to(x, new.shape) for x in (new, old, step))
    new, old, step = (channel_rows(x, axes) for x in arrays)
    large = (np.maximum(np.abs(new), np.abs(old)) >= 2 * step) & (new * old > 0)
    known = large.any(axis=1)
    if not known.any():
        return False
    ratio = np.log(np.where(large, new, 1) / np.where(large, old, 1))
    typical = np.nanmedian(np.where(large, ratio, np.nan)[known], axis=1)
    moved = np.abs(new - old) > MOVED * step
    most = np.sum(moved & large, axis=1)[known] > np.sum(large, axis=1)[known] / 2
    return bool(np.mean(most & (np.abs(typical) > OTHER)) > SOME)


def _step(new: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """The step of a weight's quantizer, or the largest that it can be."""
    if not quantizer.follows:
        scale = np.asarray(quantizer.grid(None)[0])
        return np.max(scale) if quantizer.block is not None else scale
    rest = tuple(i for i in range(new.ndim) if i not in (quantizer.axis or ()))
    low, high = quantizer.ends
    span = high if quantizer.symmetric else (high - low) / 2
    return np.max(new, axis=rest, keepdims=True) / span
