"""What the statistics of norms tell of the products, in the terms of `measured`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.scaling import dealt
from jaxmet.transforms.equalize.channel_scales import (
    Channels,
    ScaledWeight,
    in_a_row,
    stacks,
)
from jaxmet.transforms.equalize.measured import MeasuredInputs
from jaxmet.transforms.equalize.norm_statistics import Observed

QUIET = 1e-4
"""An output whose variance is below this part of what its channel or its inputs suggest
carries no signal of its own: what rounding adds to it is not counted."""


def expected(
    channels: Channels,
    weights: Sequence[ScaledWeight],
    leaves: Mapping[str, Any],
    observed: Mapping[str, Observed],
) -> dict[str, MeasuredInputs]:
    """Errors as a share of the variance of the output of a product, averaged over its outputs.

    An error of a weight is worth the power of its input, one of an input the energy of the
    weights that read it. Vectors of all layers are computed at once, which is quicker to
    compile than apart.
    """
    known = [w for w in weights if w.node.name in observed]
    if not known:
        return {}
    every = stacks(known, leaves)
    order = [w for stack in every for w in stack.weights]
    matrices = [stack.matrix(leaves) for stack in every]
    seen = jax.lax.optimization_barrier([observed[w.node.name] for w in order])
    ins = [m.shape[:3] for m in matrices]
    outs = [(*m.shape[:2], m.shape[3]) for m in matrices]

    second = jnp.concatenate([o.inputs.power.reshape(-1) for o in seen])
    energy = [jnp.sum(jnp.square(m), axis=4) for m in matrices]
    variance = jnp.concatenate([o.variance.reshape(-1) for o in seen])
    loudness = _loudness(order, energy, second, variance, channels.size)
    alive = variance > QUIET * loudness
    number = _each(outs, [s[1] * s[2] for s in outs for _ in range(s[0])])
    share = jnp.where(alive, 1 / jnp.where(alive, variance, 1.0), 0.0)
    share = share / number.astype(share.dtype)
    window = _each(ins, [m.shape[4] for m in matrices for _ in range(m.shape[0])])
    power = second * window.astype(second.dtype)

    found = {}
    pieces = zip(every, energy, dealt(share, outs), dealt(power, ins), strict=True)
    at = 0
    for stack, e, by_output, by_input in pieces:
        cost = jnp.sum(e * by_output[:, :, None], axis=3)
        gain = by_input[..., None] * by_output[:, :, None]
        for k, weight in enumerate(stack.weights):
            low, high = seen[at].inputs.low, seen[at].inputs.high
            found[weight.node.name] = MeasuredInputs(
                low, high, cost[k].reshape(-1), gain[k]
            )
            at += 1
    return found


def _loudness(
    weights: Sequence[ScaledWeight],
    energy: Sequence[jax.Array],
    power: jax.Array,
    variance: jax.Array,
    fixed: int,
) -> jax.Array:
    """How strong a signal each output should carry, whatever the scales of channels.

    A channel is as strong as the strongest output that makes it, or as what consumers see of
    it after norm and activation; an output at least as strong as its channel, and as its
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


def _each(shapes: Sequence[tuple], values: list) -> np.ndarray:
    """One value a weight, for all of its inputs or outputs."""
    sizes = [int(np.prod(shape[1:])) for shape in shapes for _ in range(shape[0])]
    return np.repeat(np.asarray(values), sizes)
