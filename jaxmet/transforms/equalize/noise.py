"""What each layer contributes to the rounding noise that the scales are chosen by."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.rounding_noise import NoisyLayers, noisy
from jaxmet.transforms.equalize.channels import (
    Channels,
    Stack,
    Weight,
    layers_of,
    stacks,
)
from jaxmet.transforms.equalize.statistics import Observed
from jaxmet.tree.config import QuantConfig, Settings

CANCELLED = 1e-4
"""An output's variance is taken to be at least this part of what its terms would add up to."""


def noisy_layers(
    channels: Channels,
    weights: Sequence[Weight],
    leaves: Mapping[str, Any],
    observed: Mapping[str, Observed],
    config: QuantConfig,
) -> NoisyLayers:
    """The layers that something is known of."""
    known = [w for w in weights if w.node.name in observed]
    settings = {w.node.name: _settings(w, config) for w in known}
    whole = [name for name, (weight, _) in settings.items() if weight.per_channel]
    every = stacks(known, leaves, whole)
    matrices = [stack.matrix(leaves) for stack in every]
    layers = layers_of(every, matrices, channels.size)
    dtype = layers.log_ranges[0].dtype
    vectors = [
        _vectors(stack, matrix, observed, settings)
        for stack, matrix in zip(every, matrices, strict=True)
    ]
    flat = [
        jnp.concatenate([v.astype(dtype).reshape(-1) for v in same])
        for same in zip(*jax.lax.optimization_barrier(vectors), strict=True)
    ]  # the barrier keeps the compiler from making one huge loop of it all
    order = [settings[w.node.name] for stack in every for w in stack.weights]
    return noisy(
        layers,
        flat[:4],
        flat[4],
        np.array([_log_step(w, 2.0 ** (w.bits - 1) - 1) for w, _ in order]),
        np.array([_log_step(a, 2.0**a.bits - 1) for _, a in order]),
        np.array([w.per_channel for w, _ in order]),
    )


def _settings(weight: Weight, config: QuantConfig) -> tuple[Settings, Settings]:
    """What the configuration says of a product's weight and of its input."""
    before = weight.node.inputs[0].node or weight.node.name
    return config.resolve(weight.parameter, "weight"), config.resolve(
        before, "activation"
    )


def _vectors(
    stack: Stack,
    matrix: jax.Array,
    observed: Mapping[str, Observed],
    settings: Mapping[str, tuple[Settings, Settings]],
) -> tuple[jax.Array, ...]:
    """power, high, low, cost (layers, groups, ins) and share (layers, groups, outs)."""
    count, groups, ins, outs, window = matrix.shape
    names = [w.node.name for w in stack.weights]
    seen = [observed[name] for name in names]

    def each(values: list[jax.Array], size: int) -> jax.Array:
        return jnp.stack(values).reshape(count, groups, size).astype(matrix.dtype)

    second = each([o.inputs.power for o in seen], ins)
    high = jnp.maximum(each([o.inputs.high for o in seen], ins), 0.0)
    low = jnp.maximum(-each([o.inputs.low for o in seen], ins), 0.0)
    symmetric = np.array([settings[name][1].symmetric for name in names])[:, None, None]
    larger = jnp.maximum(high, low)
    high, low = jnp.where(symmetric, larger, high), jnp.where(symmetric, larger, low)

    energy = jnp.sum(jnp.square(matrix), axis=4)  # (layers, groups, ins, outs)
    least = CANCELLED * jnp.sum(energy * second[..., None], axis=2)
    variance = jnp.maximum(each([o.variance for o in seen], outs), least)
    alive = variance > 0
    share = jnp.where(alive, 1 / jnp.where(alive, variance, 1.0), 0.0) / (groups * outs)
    cost = jnp.sum(energy * share[:, :, None], axis=3)

    along, across = stack.ins[0], stack.outs[0]
    return (
        along.total(second * window, 2),
        along.largest(high, 2),
        along.largest(low, 2),
        along.total(cost, 2),
        across.total(share, 2),
    )


def _log_step(settings: Settings, steps: float) -> float:
    """log 1/(12 steps²); -inf for what stays in float."""
    if not settings.quantize or settings.bits == 32:
        return -np.inf
    return -float(np.log(12 * steps**2))
