"""The objective 'noise' of a network: its layers, what is known of them and their quantizers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.rounding_noise import NoisyLayers, noisy
from jaxmet.transforms.equalize.channel_scales import (
    Channels,
    ScaledWeight,
    Stack,
    layers_of,
    stacks,
)
from jaxmet.transforms.equalize.measured import MeasuredInputs
from jaxmet.tree.config import QuantConfig, Settings


def noisy_layers(
    channels: Channels,
    weights: Sequence[ScaledWeight],
    leaves: Mapping[str, Any],
    seen: Mapping[str, MeasuredInputs],
    config: QuantConfig,
) -> NoisyLayers:
    """The layers that something is known of."""
    settings = {w.node.name: _settings(w, config) for w in weights}
    known = [
        w
        for w in weights
        if w.node.name in seen and any(map(_is_rounded, settings[w.node.name]))
    ]
    if not known:
        raise ValueError(
            "jaxmet.equalize: the configuration rounds none of the layers that could be "
            "rescaled, so objective='noise' has nothing to choose by. Pass the config "
            "that the model will be quantized with, or objective='range'."
        )
    whole = [name for name, (weight, _) in settings.items() if weight.per_channel]
    every = stacks(known, leaves, whole)
    layers = layers_of(every, [s.matrix(leaves) for s in every], channels.size)
    order = [settings[w.node.name] for stack in every for w in stack.weights]
    dtype = layers.log_ranges[0].dtype
    inputs = [_by_input(stack, seen, settings, dtype) for stack in every]
    return noisy(
        layers,
        [_gains(stack, seen, dtype) for stack in every],
        [jnp.concatenate(v) for v in zip(*inputs, strict=True)],
        np.array([_log_step(w, 2.0 ** (w.bits - 1) - 1) for w, _ in order]),
        np.array([_log_step(a, 2.0**a.bits - 1) for _, a in order]),
        np.array([w.per_channel for w, _ in order]),
    )


def _gains(stack: Stack, seen: Mapping[str, MeasuredInputs], dtype: Any) -> jax.Array:
    """Gains (layers, groups, ins, outs) of weights of one shape, taken together as they are."""
    gain = jnp.stack([seen[w.node.name].gain.astype(dtype) for w in stack.weights])
    return stack.ins[0].total(stack.outs[0].total(gain, 3), 2)


def _by_input(
    stack: Stack,
    seen: Mapping[str, MeasuredInputs],
    settings: Mapping[str, tuple[Settings, Settings]],
    dtype: Any,
) -> list[jax.Array]:
    """Reach above and below zero and cost of the inputs of weights of one shape, in a row."""
    same, shape = stack.ins[0], stack.weights[0].inputs.shape[1:]
    rows = []
    for weight in stack.weights:
        one = seen[weight.node.name]
        high, low = jnp.maximum(one.high, 0.0), jnp.maximum(-one.low, 0.0)
        if settings[weight.node.name][1].symmetric:
            high = low = jnp.maximum(high, low)
        each = [v.reshape(shape).astype(dtype) for v in (high, low, one.cost)]
        rows.append(each)
    high, low, cost = (jnp.stack(v) for v in zip(*rows, strict=True))
    reduced = (same.largest(high, 2), same.largest(low, 2), same.total(cost, 2))
    return [v.reshape(-1) for v in reduced]


def _settings(weight: ScaledWeight, config: QuantConfig) -> tuple[Settings, Settings]:
    """What the configuration says of a product's weight and of its input."""
    before = weight.node.inputs[0].node or weight.node.name
    names = (weight.parameter, weight.node.name)
    return config.resolve(names, "weight"), config.resolve(before, "activation")


def _log_step(settings: Settings, steps: float) -> float:
    """log 1/(12 steps²); -inf for what stays in float."""
    return -float(np.log(12 * steps**2)) if _is_rounded(settings) else -np.inf


def _is_rounded(settings: Settings) -> bool:
    return settings.quantize and settings.bits < 32
