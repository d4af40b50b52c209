r"""Scales that move range from one layer to the next and leave the function alone.

A rectifier is positively homogeneous, relu(s x) = s relu(x) for s > 0: what makes a channel
may be divided by any s > 0 if everything that reads it multiplies by s. All channels of a
network stand in one vector $x = \log s$, with a last entry that is always zero for what
cannot be rescaled; layers say by index which entries their inputs and outputs follow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmet.numerics.fixed_point import anderson


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

    Weights of one shape are stacked: `log_ranges[k][l, g, i, o]` is the log of the largest
    magnitude in the window between input i and output o of group g of a grouped product;
    -inf for a window of zeros. `inputs` and `outputs` list the inputs and outputs of all
    stacks in row-major order; the log scale of input j is the sum of `x[inputs[:, j]]`.
    """

    log_ranges: tuple[Float[Array, "layers groups ins outs"], ...]
    inputs: Int[np.ndarray, "factors ins"]
    outputs: Int[np.ndarray, "factors outs"]
    carried: Carried | None = None

    def by_input(self, v: Float[Array, " ins"]) -> list[jax.Array]:
        """What belongs to all inputs, in one array (layers, groups, ins) for each stack."""
        return dealt(v, [r.shape[:3] for r in self.log_ranges])

    def by_output(self, v: Float[Array, " outs"]) -> list[jax.Array]:
        """What belongs to all outputs, in one array (layers, groups, outs) for each stack."""
        return dealt(v, [(*r.shape[:2], r.shape[3]) for r in self.log_ranges])


class Balance(NamedTuple):
    """Log scales, log r1/r2 of every channel under them, and the sweeps it took."""

    x: Float[Array, " channels"]
    gap: Float[Array, " channels"]
    sweeps: Int[Array, ""]


def dealt(
    v: Float[Array, " all"], shapes: Sequence[tuple[int, ...]]
) -> list[Float[Array, "..."]]:
    """A row of values cut into arrays of these shapes."""
    parts = jax.lax.split(v, [int(np.prod(shape)) for shape in shapes])
    return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]


def log_scales(
    x: Float[Array, " channels"], index: Int[np.ndarray, "factors *axes"]
) -> Float[Array, "*axes"]:
    """The log scale along axes whose channels stand at these places of `x`."""
    return jnp.sum(x[index], axis=0)


def log_ranges(
    weight: Float[Array, "layers groups ins outs window"],
) -> Float[Array, "layers groups ins outs"]:
    """The log of the largest magnitude in each window."""
    return jnp.log(jnp.max(jnp.abs(weight), axis=4, initial=0.0))


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

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gap = range_gap(layers, x)
        return jnp.clip(x + gap / 2, lowest, highest), gap

    found = anderson(step, start, tolerance=tolerance / 2, max_steps=max_sweeps)
    return Balance(*found)


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
    r1, r2 = _ranges(layers, x)
    live = jnp.isfinite(r1) & jnp.isfinite(r2)
    gap = jnp.where(live, r1, 0.0) - jnp.where(live, r2, 0.0)
    return gap.at[-1].set(0.0)


def alive(layers: Layers, x: Float[Array, " channels"]) -> Bool[Array, " channels"]:
    """Which channels something makes and something reads; the fixed entry does not count."""
    r1, r2 = _ranges(layers, x)
    return (jnp.isfinite(r1) & jnp.isfinite(r2)).at[-1].set(False)


def _ranges(layers: Layers, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each channel the log of the largest weight that makes it and that reads it."""
    ins, outs = log_scales(x, layers.inputs), log_scales(x, layers.outputs)
    made = [
        jnp.max(r + i[..., None], axis=2).reshape(-1)
        for r, i in zip(layers.log_ranges, layers.by_input(ins), strict=True)
    ]
    read = [
        jnp.max(r - o[:, :, None], axis=3).reshape(-1)
        for r, o in zip(layers.log_ranges, layers.by_output(outs), strict=True)
    ]
    r1 = _largest(jnp.concatenate(made) - outs, layers.outputs, x)
    r2 = _largest(jnp.concatenate(read) + ins, layers.inputs, x)
    if layers.carried is not None:
        constant = layers.carried.constant - x - _log_read(layers, layers.carried, x)
        r1 = jnp.maximum(r1, constant)
    return r1, r2


def _log_read(layers: Layers, carried: Carried, x: jax.Array) -> jax.Array:
    r"""For each channel $\log \rho$ of the layer that makes it, the largest of several.

    Of a grouped product the group that reads most counts: what one reads that reads next
    to nothing says nothing of the steps of the layer's quantizers.
    """
    sizes = layers.by_input(carried.size - log_scales(x, layers.inputs))
    known = []
    for size, r in zip(sizes, layers.log_ranges, strict=True):
        top = jnp.max(size, axis=(1, 2), keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        square = jnp.max(jnp.sum(jnp.exp(2 * (size - top)), axis=2), axis=1)
        total = top[:, 0, 0] + jnp.log(jnp.where(square > 0, square, 1.0)) / 2
        shape = (*r.shape[:2], r.shape[3])
        known.append(jnp.broadcast_to(total[:, None, None], shape).reshape(-1))
    found = _largest(jnp.concatenate(known), layers.outputs, x)
    return jnp.where(jnp.isfinite(found), found, 0.0)


def _largest(values: jax.Array, index: np.ndarray, x: jax.Array) -> jax.Array:
    """The largest value at each entry of `x`."""
    every = jnp.broadcast_to(values[None], index.shape)
    return jnp.full(x.shape, -jnp.inf, x.dtype).at[index].max(every)
