"""What norms tell of the inputs and outputs of products."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmet.layers.channels import join
from jaxmet.layers.moments import MomentNetwork
from jaxmet.numerics import xp
from jaxmet.numerics.moments import Moments, normal
from jaxmet.numerics.xp import Array
from jaxmet.transforms.equalize.channel_scales import Channels, ScaledWeight


class Observed(NamedTuple):
    """Moments of a product's inputs, and the variance of its outputs."""

    inputs: Moments
    variance: Array


def predicted(
    channels: Channels, leaves: Mapping[str, Any], weights: tuple[ScaledWeight, ...]
) -> dict[str, Observed]:
    """What the norms' statistics say, carried on through the network as normal values.

    Where only the output of a product is known and nothing rescales its inputs, these are
    taken to be what would make such outputs, all of one size.
    """
    network = MomentNetwork(channels.graph, leaves)
    found = {}
    for weight in weights:
        tensor, inputs = network.known[weight.node.name], network.into(weight.node)
        if isinstance(tensor, str) or len(weight.outs) != 1:
            continue
        outputs = join(weight.outs[0].layout, tensor)
        if outputs is None:
            continue
        if isinstance(inputs, str):
            if not np.all(weight.inputs == channels.size):
                continue
            inputs = _white(weight, leaves[weight.parameter], outputs.variance)
        if inputs.mean.size == weight.inputs[0].size:
            found[weight.node.name] = Observed(inputs, outputs.variance)
    return found


def _white(weight: ScaledWeight, leaf: Any, variance: Array) -> Moments:
    total = xp.sum(xp.square(weight.matrix(leaf)))
    power = xp.sum(variance) / xp.where(total > 0, total, 1.0)
    every = xp.full(weight.inputs[0].size, power)
    return normal(xp.zeros_like(every), every)
