"""What channels carry beside their weights: constants, and how much layers read."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.layers.moments.assumed import Constants, UnitInputs
from jaxmet.numerics.scaling import Carried
from jaxmet.transforms.equalize.channel_scales import Channels, ScaledWeight, Stack


def carried(
    channels: Channels,
    weights: Sequence[ScaledWeight],
    every: Sequence[Stack],
    leaves: Mapping[str, Any],
    dtype: Any,
) -> tuple[Carried, jax.Array]:
    """Constants by channel, and what the layers of all stacks read; which are silent.

    A constant is what consumers would read if no layer read anything, and no more than
    they do read: where a clip holds it or the mean of the inputs undoes it, it is less.
    What they read follows from the norms' statistics, and without these from inputs of
    mean zero and variance one. A channel is silent if that is zero, as where a bias is
    far below a rectifier's zero: its constant is that of any value of it, before the
    rectifier too, so that a bias that does nothing does not grow without bound.
    """
    network, fixed = (
        UnitInputs(channels.graph, leaves),
        Constants(channels.graph, leaves),
    )
    # By group and joined at the end: XLA takes long over many updates of one array.
    constant = [jnp.zeros(group.size, dtype) for group in channels.free]
    silent = [jnp.ones(group.size, bool) for group in channels.free]
    for weight in weights:
        moments, alone = network.read(weight.node), fixed.read(weight.node)
        for place, group in enumerate(channels.free):
            if weight.node.name not in group.consumers:
                continue
            if isinstance(moments, str) or group.index not in moments:
                silent[place] = jnp.zeros(group.size, bool)
                continue
            size = jnp.sqrt(moments[group.index].power).astype(dtype)
            silent[place] &= size == 0
            if not isinstance(alone, str) and group.index in alone:
                held = jnp.minimum(jnp.abs(alone[group.index].mean.astype(dtype)), size)
                constant[place] = jnp.maximum(constant[place], held)
    for tensor in fixed.known.values():
        for place, group in enumerate(channels.free):
            if isinstance(tensor, str) or group.index not in tensor:
                continue
            held = jnp.abs(tensor[group.index].mean.astype(dtype))
            held = jnp.where(silent[place], held, 0.0)
            constant[place] = jnp.maximum(constant[place], held)
    # The last entry is what cannot be rescaled.
    constants = jnp.concatenate([*constant, jnp.zeros(1, dtype)])
    quiet = jnp.concatenate([*silent, jnp.zeros(1, bool)])
    sizes = [_sizes(stack, network, leaves, dtype) for stack in every]
    return Carried(_log(constants), _log(jnp.concatenate(sizes))), quiet


def _sizes(
    stack: Stack, network: UnitInputs, leaves: Mapping[str, Any], dtype: Any
) -> jax.Array:
    """The root mean square of the inputs of weights of one shape, over the window."""
    rows = []
    for weight in stack.weights:
        shape = jax.eval_shape(weight.matrix, leaves[weight.parameter]).shape
        known = network.into(weight.node)
        power = jnp.ones(shape[:2], dtype)
        if not isinstance(known, str) and known.mean.size == power.size:
            power = known.power.reshape(shape[:2]).astype(dtype)
        rows.append(power * shape[3])
    return jnp.sqrt(stack.ins[0].total(jnp.stack(rows), 2)).reshape(-1)


def _log(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)
