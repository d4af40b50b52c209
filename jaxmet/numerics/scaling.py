r"""Scales that move range from one layer to the next and leave the function alone.

A rectifier is positively homogeneous, relu(s x) = s relu(x) for s > 0: what makes a channel
may be divided by any s > 0 if everything that reads it multiplies by s. All channels of a
network stand in one vector $x = \log s$ with a last entry that is always zero, for what
cannot be rescaled; layers say by index which entries their inputs and outputs follow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Layer(NamedTuple):
    """The log ranges of one weight and the channels along it.

    `log_range[g, i, o]` is the log of the largest magnitude in the window between input i
    and output o of group g of a grouped product; -inf for a window of zeros. The log scale
    of an input is the sum of `x[inputs[:, g, i]]`, that of an output alike.
    """

    log_range: Float[Array, "groups ins outs"]
    inputs: Int[np.ndarray, "factors groups ins"]
    outputs: Int[np.ndarray, "factors groups outs"]


class Balance(NamedTuple):
    """Log scales, log r1/r2 of every channel after them, and the sweeps it took."""

    x: Float[Array, " channels"]
    gap: Float[Array, " channels"]
    sweeps: Int[Array, ""]


def log_scales(
    x: Float[Array, " channels"], index: Int[np.ndarray, "factors *axes"]
) -> Float[Array, "*axes"]:
    """The log scale along axes whose channels stand at these places of `x`."""
    return jnp.sum(x[index], axis=0)


def balance(
    layers: Sequence[Layer],
    groups: Sequence[tuple[int, int]],
    size: int,
    *,
    limit: float = 1e6,
    tolerance: float = 1e-5,
    max_sweeps: int = 2000,
) -> Balance:
    r"""Equal ranges on both sides of every channel.

    With $r^1_i$ the largest magnitude that makes channel $i$ and $r^2_i$ the largest that
    reads it, both in present scales, each group in turn takes
    $s_i \leftarrow s_i \sqrt{r^1_i / r^2_i}$, until the largest $|\log r^1_i/r^2_i|$ is
    below `tolerance`. A channel dead on either side keeps its scale. `groups` are slices
    (start, stop) of `x`, which has `size` entries and the fixed one behind them; no scale
    leaves `1/limit … limit`.

    Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
    Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, section 4.1, iterated over
    all layers; a layer that reads and makes the same channels takes half the step.
    """
    bound = float(np.log(limit))
    dtype = jnp.result_type(*(layer.log_range for layer in layers), jnp.float32)
    sides = [_sides(layers, group) for group in groups]

    def sweep(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        worst = jnp.zeros((), dtype)
        for (start, stop), side in zip(groups, sides, strict=True):
            step = _gap(layers, side, x, start, stop) * (0.25 if side.loop else 0.5)
            old = x[start:stop]
            new = jnp.clip(old + step, -bound, bound)
            worst = jnp.maximum(worst, jnp.max(jnp.abs(new - old), initial=0.0))
            x = x.at[start:stop].set(new)
        return x, 2 * worst

    def body(state: tuple) -> tuple:
        x, _, count = state
        return *sweep(x), count + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[1] >= tolerance) & (state[2] < max_sweeps)

    start = (jnp.zeros(size + 1, dtype), jnp.full((), jnp.inf, dtype), jnp.int32(0))
    x, _, count = jax.lax.while_loop(unfinished, body, start)
    gaps = [_gap(layers, side, x, *g) for g, side in zip(groups, sides, strict=True)]
    gap = jnp.zeros_like(x)
    for (a, b), value in zip(groups, gaps, strict=True):
        gap = gap.at[a:b].set(value)
    return Balance(x, gap, count)


def log_ranges(
    weight: Float[Array, "groups ins outs window"],
) -> Float[Array, "groups ins outs"]:
    """The log of the largest magnitude in each window."""
    return jnp.log(jnp.max(jnp.abs(weight), axis=3, initial=0.0))


class _Sides(NamedTuple):
    """The layers that make a group, those that read it, and whether one does both."""

    makers: tuple[int, ...]
    readers: tuple[int, ...]
    loop: bool


def _sides(layers: Sequence[Layer], group: tuple[int, int]) -> _Sides:
    def within(index: np.ndarray) -> bool:
        return bool(np.any((index >= group[0]) & (index < group[1])))

    makers = tuple(k for k, layer in enumerate(layers) if within(layer.outputs))
    readers = tuple(k for k, layer in enumerate(layers) if within(layer.inputs))
    return _Sides(makers, readers, bool(set(makers) & set(readers)))


def _gap(
    layers: Sequence[Layer], side: _Sides, x: jax.Array, start: int, stop: int
) -> jax.Array:
    """log r1/r2 of a group's channels; zero for a channel that is dead on either side."""
    lowest = jnp.full(stop - start, -jnp.inf, x.dtype)
    made, read = lowest, lowest
    for k in side.makers:
        log_range, inputs, outputs = layers[k]
        into = jnp.max(log_range + log_scales(x, inputs)[:, :, None], axis=1)
        into = into - log_scales(x, outputs)  # (groups, outs)
        made = _largest(made, into, outputs, start, stop)
    for k in side.readers:
        log_range, inputs, outputs = layers[k]
        out_of = jnp.max(log_range - log_scales(x, outputs)[:, None, :], axis=2)
        out_of = out_of + log_scales(x, inputs)  # (groups, ins)
        read = _largest(read, out_of, inputs, start, stop)
    alive = jnp.isfinite(made) & jnp.isfinite(read)
    return jnp.where(alive, made, 0.0) - jnp.where(alive, read, 0.0)


def _largest(
    so_far: jax.Array, values: jax.Array, index: np.ndarray, start: int, stop: int
) -> jax.Array:
    """The largest value at each place from start to stop."""
    flat = values.reshape(-1)
    for row in index.reshape(len(index), -1):
        where = np.flatnonzero((row >= start) & (row < stop))
        places = row[where] - start
        if np.array_equal(places, np.arange(stop - start)):
            so_far = jnp.maximum(so_far, flat[where[0] : where[-1] + 1][where - where[0]])
        elif len(where):
            so_far = so_far.at[places].max(flat[where])
    return so_far
