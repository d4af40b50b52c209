"""The objective 'noise' of a network: its layers, what is known of them and their quantizers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.layers.channels import MergedAxis
from jaxmet.numerics import xp
from jaxmet.numerics.rounding_noise import NoisyLayers, noisy
from jaxmet.numerics.xp import Array
from jaxmet.transforms.equalize.channel_scales import (
    Channels,
    MergedWeight,
    ScaledWeight,
    packed,
)
from jaxmet.transforms.equalize.measured import MeasuredInputs
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.config_fields import Settings


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
    order = [settings[w.node.name] for w in known]
    merged = [
        MergedWeight.of(w, whole=weight.per_channel)
        for w, (weight, _) in zip(known, order, strict=True)
    ]
    matrices = [w.matrix(leaves[w.parameter]) for w in known]
    layers = packed(merged, matrices, channels.size)
    dtype = matrices[0].dtype
    about = [seen[w.node.name] for w in known]
    gains = [
        m.total(one.gain.astype(dtype)) for m, one in zip(merged, about, strict=True)
    ]
    inputs = [
        _by_input(m.ins, one, a.symmetric, dtype)
        for m, one, (_, a) in zip(merged, about, order, strict=True)
    ]
    return noisy(
        layers,
        gains,
        list(zip(*inputs, strict=True)),
        [_log_step(w, 2.0 ** (w.bits - 1) - 1) for w, _ in order],
        [_log_step(a, 2.0**a.bits - 1) for _, a in order],
        [w.per_channel for w, _ in order],
    )


def _by_input(
    merged: MergedAxis, seen: MeasuredInputs, symmetric: bool, dtype: Any
) -> list[Array]:
    """Reach above and below zero and cost of the inputs of a weight."""
    high, low = xp.maximum(seen.high, 0.0), xp.maximum(-seen.low, 0.0)
    if symmetric:
        high = low = xp.maximum(high, low)
    groups = merged.index.shape[1]
    high, low, cost = (
        v.reshape(groups, -1).astype(dtype) for v in (high, low, seen.cost)
    )
    found = merged.largest(high, 1), merged.largest(low, 1), merged.total(cost, 1)
    return [v.reshape(-1) for v in found]


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
