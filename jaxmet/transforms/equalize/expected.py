"""What the statistics of norms tell of the products, in the terms of `measured`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.layers.channels import ChannelIndex
from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array
from jaxmet.transforms.equalize.channel_scales import (
    Channels,
    ScaledWeight,
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
    weights that read it.
    """
    known = [w for w in weights if w.node.name in observed]
    if not known:
        return {}
    matrices = [w.matrix(leaves[w.parameter]) for w in known]
    about = [observed[w.node.name] for w in known]
    energies = [xp.sum(xp.square(m), axis=3) for m in matrices]
    heard = _loudness(known, energies, about, channels.size)
    found = {}
    for weight, matrix, energy, one, loud in zip(
        known, matrices, energies, about, heard, strict=True
    ):
        groups, ins, outs, window = matrix.shape
        variance = one.variance.reshape(groups, outs)
        alive = variance > QUIET * loud
        share = xp.where(alive, 1 / xp.where(alive, variance, 1.0), 0.0)
        share = share / (groups * outs)
        power = one.inputs.power.reshape(groups, ins) * window
        cost = xp.sum(energy * share[:, None], axis=2)
        gain = power[..., None] * share[:, None]
        found[weight.node.name] = MeasuredInputs(
            one.inputs.low, one.inputs.high, cost.reshape(-1), gain
        )
    return found


def _loudness(
    weights: Sequence[ScaledWeight],
    energies: Sequence[Array],
    about: Sequence[Observed],
    fixed: int,
) -> list[Array]:
    """How strong a signal each output should carry, whatever the scales of channels.

    A channel is as strong as the strongest output that makes it, or as what consumers see of
    it after norm and activation; an output at least as strong as its channel, and as its
    weights make of its input channels. This tells a dead unit from a faint one.
    """
    dtype = about[0].variance.dtype
    channel = xp.zeros(fixed + 1, dtype)
    for weight, one in zip(weights, about, strict=True):
        variance, power = (
            v.reshape(-1).astype(dtype) for v in (one.variance, one.inputs.power)
        )
        channel = xp.put(channel, _one(weight.outputs, fixed), variance, "max")
        channel = xp.put(channel, _one(weight.inputs, fixed), power, "max")
    channel = xp.put(channel, fixed, 0.0)
    found = []
    for weight, energy, one in zip(weights, energies, about, strict=True):
        groups, ins, outs = energy.shape
        power = xp.maximum(
            one.inputs.power.reshape(-1).astype(dtype),
            channel[_one(weight.inputs, fixed)],
        )
        heard = xp.sum(energy * power.reshape(groups, ins)[..., None], axis=1)
        made = channel[_one(weight.outputs, fixed)].reshape(groups, outs)
        found.append(xp.maximum(heard, made))
    return found


def _one(index: np.ndarray, fixed: int) -> np.ndarray:
    """The channel of each place; the fixed one where it is not exactly one."""
    return ChannelIndex(index.reshape(len(index), -1), fixed).single
