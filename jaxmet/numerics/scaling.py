r"""Scales that move range from one layer to the next and leave the function alone.

A rectifier is positively homogeneous, relu(s x) = s relu(x) for s > 0: what makes a channel
may be divided by any s > 0 if everything that reads it multiplies by s. All channels of a
network stand in one vector $x = \log s$, with a last entry that is always zero for what
cannot be rescaled; layers say by index which entries their inputs and outputs follow.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxmet.numerics import xp
from jaxmet.numerics.fixed_point import anderson
from jaxmet.numerics.packed import (
    Packed,
    Places,
    largest_by_input,
    largest_by_output,
    pack,
    places_of,
    rounded_size,
)
from jaxmet.numerics.xp import Array


class Carried(NamedTuple):
    r"""Logarithms of what channels carry beside their weights, in original units.

    `constant` is the size of the part that does not come from the inputs (biases and the
    shifts of norms, after the activation); -inf for none. `size` is the root mean square
    of each input of a layer, summed over its window.
    """

    constant: Float[Array, " channels"]
    size: Float[Array, " ins"]


class Layers(NamedTuple):
    """The log ranges of weights, and the channels along them.

    `log_ranges` holds the log of the largest magnitude in each window; -inf for a window of
    zeros. The log scale of input j is the sum of `x[inputs[:, j]]`. Vectors are filled up to
    one of few sizes with what belongs to the last layer, which does not exist, and follows
    the last channel.
    """

    log_ranges: Packed
    at: Places
    inputs: Int[Array, "factors ins"]
    outputs: Int[Array, "factors outs"]
    input_group: Int[Array, " ins"]
    group_layer: Int[Array, " groups"]
    output_layer: Int[Array, " outs"]
    carried: Carried | None = None

    @property
    def input_layer(self) -> Array:
        return self.group_layer[self.input_group]


class Balance(NamedTuple):
    """Log scales, log r1/r2 of every channel under them, and the sweeps it took.

    `alive` are the channels that something makes and something reads.
    """

    x: Float[Array, " channels"]
    gap: Float[Array, " channels"]
    alive: Bool[Array, " channels"]
    sweeps: Int[Array, ""]


def layers_of(
    log_ranges: Sequence[Float[Array, "_ _ _"]],
    inputs: Sequence[Int[np.ndarray, "_ _ _"]],
    outputs: Sequence[Int[np.ndarray, "_ _ _"]],
    fixed: int,
) -> Layers:
    """All layers, packed.

    Args:
        log_ranges: for each layer the logs of the magnitudes, (groups, ins, outs).
        inputs: for each layer the places of the channels of its inputs, (factors, groups, ins).
        outputs: likewise of its outputs.
        fixed: the place of what cannot be rescaled, after all channels.

    Returns:
        The layers, without what they carry.
    """
    last = rounded_size(fixed + 1) - 1
    ins, outs = (
        rounded_size(1 + sum(index[0].size for index in v)) for v in (inputs, outputs)
    )
    counts, each = ([index.shape[i] for index in inputs] for i in (1, 2))
    made = [index[0].size for index in outputs]
    numbers = np.arange(len(counts))
    # As many layers as groups, so that one size serves both.
    layer = group = rounded_size(sum(counts) + 1) - 1

    def full(v: np.ndarray, size: int, fill: int) -> Any:
        sides = [(0, 0)] * (v.ndim - 1) + [(0, size - v.shape[-1])]
        return np.pad(v, sides, constant_values=fill).astype(np.int32)

    def channels(indices: Sequence[np.ndarray], size: int) -> Any:
        index = in_a_row(indices, fixed)
        return full(np.where(index == fixed, last, index), size, last)

    return Layers(
        pack(log_ranges, -xp.inf),
        places_of([r.shape for r in log_ranges], ins, outs),
        channels(inputs, ins),
        channels(outputs, outs),
        full(np.repeat(np.arange(sum(counts)), np.repeat(each, counts)), ins, group),
        full(np.repeat(numbers, counts), group + 1, layer),
        full(np.repeat(numbers, made), outs, layer),
    )


def carrying(layers: Layers, carried: Carried) -> Layers:
    """The layers with what their channels carry, of vectors that are not filled up.

    Args:
        layers: the layers, filled up to one of few sizes.
        carried: logarithms by channel and by input, not filled up.

    Returns:
        The layers with both vectors, filled up.
    """
    constant, size = carried
    more = layers.input_group.size - size.size
    size = xp.pad(size, (0, more), constant_values=-xp.inf)
    return layers._replace(carried=Carried(filled(constant, -xp.inf), size))


def in_a_row(indices: Sequence[np.ndarray], fixed: int) -> np.ndarray:
    """Indices (factors, …) one after the other, in row-major order.

    Args:
        indices: one integer array (factors, *axes) per axis of a weight.
        fixed: the index that stands for what cannot be rescaled, where one has fewer factors.

    Returns:
        The indices, (most factors, entries).
    """
    depth = max(len(index) for index in indices)
    flat = [index.reshape(len(index), -1) for index in indices]
    short = [((0, depth - len(index)), (0, 0)) for index in indices]
    padded = [
        np.pad(i, width, constant_values=fixed)
        for i, width in zip(flat, short, strict=True)
    ]
    return np.concatenate(padded, axis=1)


def filled(v: Float[Array, " channels"], fill: float) -> Float[Array, " more"]:
    """A vector of channels filled up before its last entry.

    Args:
        v: a float array (channels,), its last entry that of what cannot be rescaled.
        fill: the value of the entries that are added.

    Returns:
        A vector of one of few sizes, the last entry still the last.
    """
    more = rounded_size(v.size) - v.size
    return xp.concatenate([v[:-1], np.full(more, fill, v.dtype), v[-1:]])


def cut_back(v: Shaped[Array, " more"], size: int) -> Shaped[Array, " channels"]:
    """The vector of this size that `filled` made longer.

    Args:
        v: a vector that was filled up.
        size: how many entries it had before.

    Returns:
        The first `size - 1` entries and the last one.
    """
    return xp.concatenate([v[: size - 1], v[-1:]])


def log_scales(
    x: Float[Array, " channels"], index: Int[Array, "factors *axes"]
) -> Float[Array, "*axes"]:
    """The log scale along axes whose channels stand at these places of `x`.

    Args:
        x: the log scales of all channels, a float array (channels,).
        index: where they stand in `x`, an integer array (factors, *axes); factors add up.

    Returns:
        The log scales, (*axes).
    """
    return jnp.sum(x[index], axis=0)


def log_ranges(
    weight: Float[Array, "groups ins outs window"],
) -> Float[Array, "groups ins outs"]:
    """The log of the largest magnitude in each window.

    Args:
        weight: a weight, a float array (groups, ins, outs, window).

    Returns:
        The logarithms, (groups, ins, outs); -inf for a window of zeros.
    """
    return xp.log(xp.max(xp.abs(weight), axis=3, initial=0.0))


def balance(
    layers: Layers,
    start: Float[Array, " channels"],
    *,
    lowest: Float[Array, " channels"],
    highest: Float[Array, " channels"],
    tolerance: float = 1e-5,
    max_sweeps: int = 1000,
) -> Balance:
    r"""Equal ranges on both sides of every channel.

    With $r^1_i$ the largest magnitude that makes channel $i$ and $r^2_i$ the largest that
    reads it, both in present scales, $s_i \leftarrow s_i \sqrt{r^1_i / r^2_i}$ until the
    largest $|\log r^1_i / r^2_i|$ is below `tolerance`. A channel that is dead on either
    side keeps its scale, and no log scale leaves `lowest … highest`.

    The magnitude that makes a channel counts its constant $c_i$ too, in the units of the
    weights: $r^1_i = \max(\max_j |W_{ji}|, |c_i|/\rho)$ where $\rho$ is the root mean square
    of all that the layer reads together, in present scales. Rounding errors of variance
    $\Delta^2$ in the weights of the channel disturb its consumers by
    $\Delta s_i \rho r^2_i$, and those in the consumers' weights by
    $\Delta (|c_i| + \rho r_i) / s_i$; both are equal at
    $s_i^2 = (r_i + |c_i|/\rho) / r^2_i$. So a constant counts only where it is larger than
    anything that the weights make, as in a channel whose weights are nearly zero.

    In log s the step is monotone, adds what is added to all its arguments, and so never
    takes two points apart in the maximum norm: averaged steps converge, and Anderson's
    acceleration makes that quick. Where channels go round in a circle (residual blocks)
    several answers may be equally balanced.

    Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
    Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, section 4.1, all layers at
    once instead of pair by pair.

    Args:
        layers: the magnitudes of weights, and which channels they belong to.
        start: the first log scales.
        lowest: the lower bounds of log scales.
        highest: the upper bounds.
        tolerance: the largest imbalance at the end; default 1e-5.
        max_sweeps: how many sweeps at most; default 1,000.

    Returns:
        The log scales, the imbalance of each channel, and the number of sweeps.
    """
    vectors = (filled(v, 0.0) for v in (start, lowest, highest))
    x, gap, alive, sweeps = _balanced(layers, *vectors, tolerance, max_sweeps)
    x, gap, alive = (cut_back(v, start.size) for v in (x, gap, alive))
    return Balance(x, gap, alive, sweeps)


@xp.compiled
def _balanced(
    layers: Layers,
    start: jax.Array,
    lowest: jax.Array,
    highest: jax.Array,
    tolerance: Array | float,
    max_sweeps: Array | int,
) -> tuple[jax.Array, ...]:
    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gap = _gap(layers, x)
        return jnp.clip(x + gap / 2, lowest, highest), gap

    found = anderson(step, start, tolerance=tolerance / 2, max_steps=max_sweeps)
    return found.x, found.about, _alive(*_ranges(layers, start)), found.steps


def range_gap(
    layers: Layers, x: Float[Array, " channels"]
) -> Float[Array, " channels"]:
    """log r1/r2 of every channel; zero for one that is dead on either side, or fixed.

    Args:
        layers: the magnitudes of weights, and which channels they belong to.
        x: the log scales.

    Returns:
        The log of the ratio of both ranges, by channel.
    """
    return balance(layers, x, lowest=x, highest=x, max_sweeps=1).gap


def _gap(layers: Layers, x: jax.Array) -> jax.Array:
    r1, r2 = _ranges(layers, x)
    live = _alive(r1, r2)
    return jnp.where(live, r1, 0.0) - jnp.where(live, r2, 0.0)


def _alive(r1: jax.Array, r2: jax.Array) -> jax.Array:
    """Which channels something makes and something reads; the fixed entry does not count."""
    return (jnp.isfinite(r1) & jnp.isfinite(r2)).at[-1].set(False)


def _ranges(layers: Layers, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each channel the log of the largest weight that makes it and that reads it."""
    ins, outs = log_scales(x, layers.inputs), log_scales(x, layers.outputs)
    made = largest_by_output(layers.log_ranges, layers.at, ins, outs.size)
    read = largest_by_input(layers.log_ranges, layers.at, -outs, ins.size)
    r1 = _largest(made - outs, layers.outputs, x)
    r2 = _largest(read + ins, layers.inputs, x)
    if layers.carried is not None:
        constant = layers.carried.constant - x - _log_read(layers, layers.carried, x)
        r1 = jnp.maximum(r1, constant)
    return r1, r2


def _log_read(layers: Layers, carried: Carried, x: jax.Array) -> jax.Array:
    r"""For each channel $\log \rho$ of the layer that makes it, the largest of several.

    Of a grouped product the group that reads most counts: what one reads that reads next
    to nothing says nothing of the steps of the layer's quantizers.
    """
    size = carried.size - log_scales(x, layers.inputs)
    number = layers.group_layer.size  # of groups, and no fewer than there are layers
    top = jax.ops.segment_max(size, layers.input_layer, number)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    square = jnp.exp(2 * (size - top[layers.input_layer]))
    square = jax.ops.segment_sum(square, layers.input_group, number)
    square = jax.ops.segment_max(square, layers.group_layer, number)
    total = top + jnp.log(jnp.where(square > 0, square, 1.0)) / 2
    found = _largest(total[layers.output_layer], layers.outputs, x)
    return jnp.where(jnp.isfinite(found), found, 0.0)


def _largest(values: jax.Array, index: Array, x: jax.Array) -> jax.Array:
    """The largest value at each entry of `x`."""
    every = jnp.broadcast_to(values[None], index.shape)
    return jnp.full(x.shape, -jnp.inf, x.dtype).at[index].max(every)
