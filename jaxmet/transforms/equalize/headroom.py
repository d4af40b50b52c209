"""How far channels can be rescaled before a leaf leaves what its dtype can represent."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.channel_groups import layout_size
from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.numerics.xp import Array
from jaxmet.transforms.equalize.channel_scales import POWERS, Channels, ScaledWeight
from jaxmet.tree.leaves import dense


def headroom(
    channels: Channels,
    weights: Sequence[ScaledWeight],
    leaves: Mapping[str, Any],
    limit: float,
    dtype: Any,
) -> tuple[Array, Array]:
    """The lowest and the highest log scale of each channel, within ±log(limit).

    Under them no leaf overflows, and the largest weight along a channel stays a normal
    number: rounding the smaller ones to subnormal numbers is then no worse than rounding
    the largest. What several scales multiply shares its room among them. It is float16
    that runs out of room; log scales up to that of 1e6 hardly fill any other dtype.
    """
    bound = xp.full(channels.size + 1, float(np.log(limit)), dtype)
    places, lows, highs = [], [], []
    for index, power, share, above, below in _rooms(channels, weights, leaves):
        down, up = (below, above) if power > 0 else (above, below)
        share = share * abs(power)
        places.append(index.reshape(-1))
        highs.append(_room(up, share, index, dtype).reshape(-1))
        lows.append(-_room(down, share, index, dtype).reshape(-1))
    if not places:
        return -bound, bound
    every = np.concatenate(places)
    lowest = xp.put(-bound, every, xp.concatenate(lows), "max")
    return lowest, xp.put(bound, every, xp.concatenate(highs), "min")


def _room(room: Array, share: int, index: np.ndarray, dtype: Any) -> Array:
    room = xp.maximum(room, 0.0).astype(dtype) / share
    return xp.broadcast_to(room.reshape(-1), index.shape)


def _rooms(
    channels: Channels, weights: Sequence[ScaledWeight], leaves: Mapping[str, Any]
) -> list[tuple[np.ndarray, int, int, Array, Array]]:
    """Places (factors, n), the power of their scales, and logs of the room up and down."""
    found = []
    for weight in weights:
        leaf = leaves[weight.parameter]
        largest = xp.max(xp.abs(weight.matrix(leaf)), axis=3, initial=0.0)
        sides = (
            (weight.inputs, POWERS["in"], xp.max(largest, axis=2)),
            (weight.outputs, POWERS["out"], xp.max(largest, axis=1)),
        )
        rows = sum(len(index) for index, _, _ in sides)
        for index, power, size in sides:
            above, below = _margins(size, leaf)
            found.append((index.reshape(len(index), -1), power, rows, above, below))
    for member in channels.graph.members:
        if member.role not in ("shift", "variance") or not channels.touched(member):
            continue
        leaf, index = leaves[member.parameter], channels.along(member.layout).index
        size = xp.abs(xp.asarray(dense(leaf))).reshape(-1)
        if size.size == layout_size(member.layout):
            above, _ = _margins(size.astype(wide(size.dtype)), leaf)
            room = xp.full_like(above, xp.inf)  # a small shift may vanish
            found.append((index, POWERS[member.role], len(index), above, room))
    return found


def _margins(size: Array, leaf: Any) -> tuple[Array, Array]:
    """Logs of the factors by which values can grow and shrink; infinite for zeros."""
    info = jnp.finfo(leaf.dtype)
    size = size.reshape(-1)
    log = xp.log(xp.where(size > 0, size, 1.0))
    above = xp.where(size > 0, float(np.log(float(info.max))) - log, xp.inf)
    below = xp.where(size > 0, log - float(np.log(float(info.tiny))), xp.inf)
    return above, below
