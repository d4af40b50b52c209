"""Bias correction without data, from what norms know of the inputs of products."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.channels import join
from jaxmet.layers.folds.norm_parameters import statistics_weight
from jaxmet.layers.layer import by_channel
from jaxmet.layers.leaf_math import shifted
from jaxmet.layers.moments import MomentNetwork
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.numerics.xp import Array
from jaxmet.transforms.correct_bias.bias_parameters import BiasParameter, why_unfit
from jaxmet.transforms.correct_bias.sequential_correction import Found
from jaxmet.transforms.correct_bias.shared_biases import (
    best_shift,
    layers_of,
    positions_of,
    skipped_together,
)
from jaxmet.tree.host_rounding import round_in_numpy
from jaxmet.tree.leaves import dense
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers

Leaves = Mapping[str, Any]


def correct_by_statistics(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    places: Sequence[BiasParameter],
    reference: Any,
) -> tuple[Any, dict[str, Found]]:
    """The tree with every bias corrected, and by layer what was found there.

    All layers are corrected at once: what enters each of them has the means of the
    reference, since that is what its corrected predecessors give it.
    """
    exact, leaves = named_leaves(reference), named_leaves(params)
    places = [p for p in places if p.why is None]
    left = {p.layer.name: _unfit(graph, p, exact, leaves) for p in places}
    shared = [names for names in layers_of(places).values() if len(names) > 1]
    positions = positions_of(graph, params, {n for names in shared for n in names})
    free = [p for p in places if left[p.layer.name] is None]

    def solve(exact: Leaves, leaves: Leaves) -> tuple[Leaves, dict[str, Found]]:
        network = MomentNetwork(graph, exact)
        for place in free:
            inputs = network.into(place.layer)
            if isinstance(inputs, str):
                left[place.layer.name] = inputs
        left.update(skipped_together(places, left))
        known = [p for p in free if left[p.layer.name] is None]
        return _corrections(network, quantizers, known, leaves, positions)

    arrays = [
        {k: v for k, v in x.items() if hasattr(v, "dtype")} for x in (exact, leaves)
    ]
    new, found = run_once(solve, *arrays)
    unknown = {name: Found(why=why) for name, why in left.items() if why is not None}
    return replace_leaves(params, new), {**found, **unknown}


def _unfit(
    graph: Graph, place: BiasParameter, exact: Leaves, leaves: Leaves
) -> str | None:
    """Why a layer with a place cannot be corrected without data, as far as shapes say."""
    weight, norm = place.layer.weight, graph[place.at].norm
    assert weight is not None
    if weight.name is None:
        return place.layer.why_kept()
    leaf = leaves[weight.name]
    if weight.name not in exact or tuple(exact[weight.name].shape) != tuple(leaf.shape):
        return f"the reference has no {weight.name!r} of this shape"
    if norm is not None and (norm.variance is None or norm.variance not in leaves):
        return f"the variance of {place.at!r} is no parameter"
    features = [leaf.shape[i] for i in weight.out_axes]
    return why_unfit(place.into, leaves[place.into], features)


def _corrections(
    network: MomentNetwork,
    quantizers: Quantizers,
    places: Sequence[BiasParameter],
    leaves: Leaves,
    positions: Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, Found]]:
    """The new biases of layers whose mean inputs are known, and what was found."""
    found, new = {}, {}
    for place in places:
        shift = _mean_error(network, quantizers, place.layer, leaves)
        if place.at != place.layer.name:
            shift = shift * _gain(network.graph[place.at], leaves)
        tensor = network.known[place.at]
        out, variance = network.member(place.layer.name, "out"), None
        if out is not None and not isinstance(tensor, str):
            made = join(out.layout, tensor)
            variance = None if made is None else made.variance
        found[place.layer.name] = Found(shift, variance)
    for into, names in layers_of(places).items():
        counts = [positions.get(name, 1) for name in names]
        shift = best_shift([found[name].shift for name in names], counts)
        new[into] = shifted(leaves[into], -shift)
        found |= {name: found[name]._replace(shift=shift) for name in names}
    return new, found


def _mean_error(
    network: MomentNetwork, quantizers: Quantizers, layer: Node, leaves: Leaves
) -> Array:
    r"""$\sum_i (\sum_{window} \hat W_{io} - W_{io}) E[x_i]$ for every output o.

    Of an input that is dilated, most places that a window meets are empty.
    """
    inputs, weight = network.into(layer), layer.weight
    assert (
        not isinstance(inputs, str) and weight is not None and weight.name is not None
    )
    name = weight.name
    quantizer, array = quantizers.weights[name], dense(leaves[name])
    numbers = isinstance(array, np.ndarray)
    rounded = round_in_numpy(quantizer, array) if numbers else quantizer(array)
    rounded = by_channel(layer, rounded)
    error = rounded - by_channel(layer, network.leaves[name]).astype(rounded.dtype)
    error = xp.sum(error, axis=3)  # (groups, ins, outs)
    mean = inputs.mean.reshape(error.shape[:2]).astype(error.dtype)
    shift = xp.einsum("gio,gi->go", error, mean, precision="highest").reshape(-1)
    for step in layer.convolution.input_dilation if layer.convolution else ():
        shift = shift / step
    return shift


def _gain(node: Node, leaves: Leaves) -> Array:
    """What a norm with stored statistics multiplies by."""
    norm = node.norm
    assert norm is not None and norm.variance is not None
    variance = xp.asarray(dense(leaves[norm.variance])).reshape(-1)
    variance = variance.astype(wide(variance.dtype))
    variance = variance * statistics_weight(norm, leaves, variance.dtype)
    gain = norm.factor / xp.sqrt(variance + norm.epsilon)
    if norm.scale is None:
        return gain
    scale = xp.asarray(dense(leaves[norm.scale])).reshape(-1)
    return scale.astype(gain.dtype) * gain
