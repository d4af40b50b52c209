"""What each layer contributes to the rounding noise that the scales are chosen by."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.rounding_noise import NoisyLayers, noisy
from jaxmet.numerics.scaling import dealt
from jaxmet.transforms.equalize.channels import (
    Channels,
    Stack,
    Weight,
    in_a_row,
    layers_of,
    stacks,
)
from jaxmet.transforms.equalize.statistics import Observed
from jaxmet.tree.config import QuantConfig, Settings

QUIET = 1e-4
"""An output whose variance is below this part of what its channel or its inputs suggest
carries no signal of its own: what rounding adds to it is not counted."""


def noisy_layers(
    channels: Channels,
    weights: Sequence[Weight],
    leaves: Mapping[str, Any],
    observed: Mapping[str, Observed],
    config: QuantConfig,
) -> NoisyLayers:
    """The layers that something is known of."""
    settings = {w.node.name: _settings(w, config) for w in weights}
    known = [
        w
        for w in weights
        if w.node.name in observed and any(map(_is_rounded, settings[w.node.name]))
    ]
    if not known:
        raise ValueError(
            "jaxmet.equalize: the configuration rounds none of the layers that could be "
            "rescaled, so objective='noise' has nothing to choose by. Pass the config "
            "that the model will be quantized with, or objective='range'."
        )
    whole = [name for name, (weight, _) in settings.items() if weight.per_channel]
    every = stacks(known, leaves, whole)
    matrices = [stack.matrix(leaves) for stack in every]
    layers = layers_of(every, matrices, channels.size)
    by_input, share = _vectors(every, matrices, observed, settings, channels.size)
    order = [settings[w.node.name] for stack in every for w in stack.weights]
    return noisy(
        layers,
        [v.astype(layers.log_ranges[0].dtype) for v in by_input],
        share.astype(layers.log_ranges[0].dtype),
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
    every: Sequence[Stack],
    matrices: Sequence[jax.Array],
    observed: Mapping[str, Observed],
    settings: Mapping[str, tuple[Settings, Settings]],
    fixed: int,
) -> tuple[list[jax.Array], jax.Array]:
    """power, high, low and cost of all inputs in a row, and share of all outputs.

    Vectors of all layers are computed at once, which is quicker to compile than apart.
    """
    weights = [w for stack in every for w in stack.weights]
    seen = jax.lax.optimization_barrier([observed[w.node.name] for w in weights])
    ins = [m.shape[:3] for m in matrices]
    outs = [(*m.shape[:2], m.shape[3]) for m in matrices]

    second = jnp.concatenate([o.inputs.power.reshape(-1) for o in seen])
    high = jnp.concatenate([o.inputs.high.reshape(-1) for o in seen])
    low = jnp.concatenate([o.inputs.low.reshape(-1) for o in seen])
    high, low = jnp.maximum(high, 0.0), jnp.maximum(-low, 0.0)
    symmetric = _each(
        weights, ins, [settings[w.node.name][1].symmetric for w in weights]
    )
    larger = jnp.maximum(high, low)
    high, low = jnp.where(symmetric, larger, high), jnp.where(symmetric, larger, low)
    window = _each(
        weights, ins, [m.shape[4] for m in matrices for _ in range(m.shape[0])]
    )
    power = second * window.astype(second.dtype)

    energy = [jnp.sum(jnp.square(m), axis=4) for m in matrices]
    variance = jnp.concatenate([o.variance.reshape(-1) for o in seen])
    alive = variance > QUIET * _loudness(weights, energy, second, variance, fixed)
    number = _each(weights, outs, [s[1] * s[2] for s in outs for _ in range(s[0])])
    share = jnp.where(alive, 1 / jnp.where(alive, variance, 1.0), 0.0)
    share = share / number.astype(share.dtype)
    cost = [
        jnp.sum(e * v[:, :, None], axis=3).reshape(-1)
        for e, v in zip(energy, dealt(share, outs), strict=True)
    ]

    def reduced(v: jax.Array, shapes: list, side: str, how: str) -> jax.Array:
        same = [getattr(stack, side)[0] for stack in every]
        if all(s.of is None for s in same):
            return v
        parts = zip(same, dealt(v, shapes), strict=True)
        return jnp.concatenate([getattr(s, how)(p, 2).reshape(-1) for s, p in parts])

    by_input = [
        reduced(power, ins, "ins", "total"),
        reduced(high, ins, "ins", "largest"),
        reduced(low, ins, "ins", "largest"),
        reduced(jnp.concatenate(cost), ins, "ins", "total"),
    ]
    return by_input, reduced(share, outs, "outs", "total")


def _loudness(
    weights: Sequence[Weight],
    energy: Sequence[jax.Array],
    power: jax.Array,
    variance: jax.Array,
    fixed: int,
) -> jax.Array:
    """How strong a signal each output should carry, whatever the scales of channels.

    A channel is as strong as the strongest output that makes it, or as what readers see of
    it behind norm and activation; an output at least as strong as its channel, and as its
    weights make of its input channels. So a dead unit is told from a faint one.
    """
    read = in_a_row([w.inputs for w in weights], fixed)
    made = in_a_row([w.outputs for w in weights], fixed)
    channel = jnp.zeros(fixed + 1, variance.dtype)
    channel = channel.at[_one(made, fixed)].max(variance)
    channel = channel.at[_one(read, fixed)].max(power.astype(variance.dtype))
    channel = channel.at[fixed].set(0.0)
    inputs = jnp.maximum(power, channel[_one(read, fixed)])
    shapes = [e.shape[:3] for e in energy]
    heard = [
        jnp.sum(e * v[..., None], axis=2).reshape(-1)
        for e, v in zip(energy, dealt(inputs, shapes), strict=True)
    ]
    return jnp.maximum(jnp.concatenate(heard), channel[_one(made, fixed)])


def _one(rows: np.ndarray, fixed: int) -> np.ndarray:
    """The channel of each place; the fixed one where it is not exactly one."""
    several = np.sum(rows != fixed, axis=0) > 1
    return np.where(several, fixed, np.min(rows, axis=0))


def _each(
    weights: Sequence[Weight], shapes: Sequence[tuple], values: list
) -> np.ndarray:
    """One value a weight, for all of its inputs or outputs."""
    sizes = [int(np.prod(shape[1:])) for shape in shapes for _ in range(shape[0])]
    assert len(sizes) == len(weights)
    return np.repeat(np.asarray(values), sizes)


def _log_step(settings: Settings, steps: float) -> float:
    """log 1/(12 steps²); -inf for what stays in float."""
    return -float(np.log(12 * steps**2)) if _is_rounded(settings) else -np.inf


def _is_rounded(settings: Settings) -> bool:
    return settings.quantize and settings.bits < 32
