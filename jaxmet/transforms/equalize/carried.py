"""What channels carry beside their weights: constants, and how much layers read."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmet.layers.channels import MergedAxis
from jaxmet.layers.moments.assumed import Constants, UnitInputs
from jaxmet.numerics import xp
from jaxmet.numerics.scaling import Carried
from jaxmet.numerics.xp import Array
from jaxmet.transforms.equalize.channel_scales import (
    Channels,
    MergedWeight,
    ScaledWeight,
)


def carried(
    channels: Channels,
    weights: Sequence[ScaledWeight],
    merged: Sequence[MergedWeight],
    leaves: Mapping[str, Any],
    dtype: Any,
) -> tuple[Carried, Array]:
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
    constant = [xp.zeros(group.size, dtype) for group in channels.free]
    silent = [xp.ones(group.size, bool) for group in channels.free]
    for weight in weights:
        moments, alone = network.read(weight.node), fixed.read(weight.node)
        for place, group in enumerate(channels.free):
            if weight.node.name not in group.consumers:
                continue
            if isinstance(moments, str) or group.index not in moments:
                silent[place] = xp.zeros(group.size, bool)
                continue
            size = xp.sqrt(moments[group.index].power).astype(dtype)
            silent[place] &= size == 0
            if not isinstance(alone, str) and group.index in alone:
                held = xp.minimum(xp.abs(alone[group.index].mean.astype(dtype)), size)
                constant[place] = xp.maximum(constant[place], held)
    for tensor in fixed.known.values():
        for place, group in enumerate(channels.free):
            if isinstance(tensor, str) or group.index not in tensor:
                continue
            held = xp.abs(tensor[group.index].mean.astype(dtype))
            held = xp.where(silent[place], held, 0.0)
            constant[place] = xp.maximum(constant[place], held)
    # The last entry is what cannot be rescaled.
    constants = xp.concatenate([*constant, xp.zeros(1, dtype)])
    quiet = xp.concatenate([*silent, xp.zeros(1, bool)])
    sizes = [
        _size(weight, one.ins, network, leaves, dtype)
        for weight, one in zip(weights, merged, strict=True)
    ]
    return Carried(_log(constants), _log(xp.concatenate(sizes))), quiet


def _size(
    weight: ScaledWeight,
    merged: MergedAxis,
    network: UnitInputs,
    leaves: Mapping[str, Any],
    dtype: Any,
) -> Array:
    """The root mean square of the inputs of a weight, over the window."""
    groups, ins, _, window = weight.sizes(leaves[weight.parameter])
    known = network.into(weight.node)
    power = xp.ones((groups, ins), dtype)
    if not isinstance(known, str) and known.mean.size == power.size:
        power = known.power.reshape(groups, ins).astype(dtype)
    return xp.sqrt(merged.total(power * window, 1)).reshape(-1)


def _log(x: Array) -> Array:
    return xp.where(x > 0, xp.log(xp.where(x > 0, x, 1.0)), -xp.inf)
