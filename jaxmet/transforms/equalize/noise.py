"""What each layer contributes to the rounding noise that the scales are chosen by."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.rounding_noise import NoisyLayers, log_or_faint
from jaxmet.numerics.scaling import log_ranges
from jaxmet.transforms.equalize.channels import (
    Channels,
    Weight,
    same_scale,
    stacked,
    wide,
)
from jaxmet.transforms.equalize.statistics import Observed
from jaxmet.tree.config import QuantConfig, Settings

CANCELLED = 1e-4
"""An output's variance is taken to be at least this part of what its terms would add up to."""


class _Layer(NamedTuple):
    log_range: jax.Array
    inputs: np.ndarray
    outputs: np.ndarray
    power: jax.Array
    high: jax.Array
    low: jax.Array
    cost: jax.Array
    share: jax.Array
    weight_step: float
    input_step: float
    per_channel: bool


def noisy_layers(
    channels: Channels,
    weights: Sequence[Weight],
    leaves: Mapping[str, Any],
    observed: Mapping[str, Observed],
    config: QuantConfig,
) -> list[NoisyLayers]:
    """The layers that something is known of, those of one shape together."""
    known = [w for w in weights if w.node.name in observed]
    dtype = wide(*(leaves[w.parameter].dtype for w in known))
    shapes: dict[Any, list[_Layer]] = {}
    for weight in known:
        layer = _layer(weight, leaves[weight.parameter], observed[weight.node.name], config)
        shapes.setdefault((layer.log_range.shape, layer.per_channel), []).append(layer)
    return [_stack(same, channels.size, dtype) for same in shapes.values()]


def _stack(same: list[_Layer], fixed: int, dtype: Any) -> NoisyLayers:
    fields = {}
    for name in NoisyLayers._fields:
        values = [getattr(layer, name) for layer in same]
        if name in ("inputs", "outputs"):
            fields[name] = stacked(values, fixed)
        elif name == "per_channel":
            fields[name] = values[0]
        else:
            fields[name] = jnp.stack([jnp.asarray(v, dtype) for v in values])
    return NoisyLayers(**fields)


def _layer(weight: Weight, leaf: Any, seen: Observed, config: QuantConfig) -> _Layer:
    matrix = weight.matrix(leaf)  # (groups, ins, outs, window)
    groups, ins, outs, window = matrix.shape
    tensor = weight.node.inputs[0].node or weight.node.name
    on_weight = config.resolve(weight.parameter, "weight")
    on_input = config.resolve(tensor, "activation")

    second = seen.inputs.power.reshape(groups, ins)
    high, low = (
        jnp.maximum(v, 0.0).reshape(groups, ins)
        for v in (seen.inputs.high, -seen.inputs.low)
    )
    if on_input.symmetric:
        high = low = jnp.maximum(high, low)
    energy = jnp.sum(jnp.square(matrix), axis=3)  # (groups, ins, outs)
    least = CANCELLED * jnp.sum(energy * second[:, :, None], axis=1)
    variance = jnp.maximum(seen.variance.reshape(groups, outs), least)
    alive = variance > 0
    share = jnp.where(alive, 1 / jnp.where(alive, variance, 1.0), 0.0) / (groups * outs)
    cost = jnp.sum(energy * share[:, None], axis=2)

    along, across = same_scale(weight.inputs), same_scale(weight.outputs)
    log_range = along.largest(log_ranges(matrix), 1)
    if on_weight.per_channel:  # then each output has a grid of its own
        index = weight.outputs
    else:
        index, log_range = across.index, across.largest(log_range, 2)
        share = across.total(share, 1)
    return _Layer(
        log_range,
        along.index,
        index,
        log_or_faint(along.total(second * window, 1), (0, 1)),
        log_or_faint(along.largest(high, 1), (0, 1)),
        log_or_faint(along.largest(low, 1), (0, 1)),
        log_or_faint(along.total(cost, 1), (0, 1)),
        log_or_faint(share, (0, 1)),
        _log_step(on_weight, 2.0 ** (on_weight.bits - 1) - 1),
        _log_step(on_input, 2.0**on_input.bits - 1),
        on_weight.per_channel,
    )


def _log_step(settings: Settings, steps: float) -> float:
    """log 1/(12 steps²); -inf for what stays in float."""
    if not settings.quantize or settings.bits == 32:
        return -np.inf
    return -float(np.log(12 * steps**2))
