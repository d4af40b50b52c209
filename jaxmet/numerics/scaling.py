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
from jaxtyping import Array, Float, Int

from jaxmet.numerics.fixed_point import anderson

Index = Int[np.ndarray, "factors *axes"]


class Layers(NamedTuple):
    """The log ranges of the weights of layers of one shape, and the channels along them.

    `log_range[l, g, i, o]` is the log of the largest magnitude in the window between input
    i and output o of group g of a grouped product; -inf for a window of zeros. The log
    scale of an input is the sum of `x[inputs[:, l, g, i]]`, that of an output alike.
    """

    log_range: Float[Array, "layers groups ins outs"]
    inputs: Int[np.ndarray, "factors layers groups ins"]
    outputs: Int[np.ndarray, "factors layers groups outs"]


class Balance(NamedTuple):
    """Log scales, log r1/r2 of every channel under them, and the sweeps it took."""

    x: Float[Array, " channels"]
    gap: Float[Array, " channels"]
    sweeps: Int[Array, ""]


def log_scales(
    x: Float[Array, " channels"], index: Int[np.ndarray, "factors *axes"]
) -> Float[Array, "*axes"]:
    """The log scale along axes whose channels stand at these places of `x`."""
    return jnp.sum(x[index], axis=0)


def log_ranges(
    weight: Float[Array, "groups ins outs window"],
) -> Float[Array, "groups ins outs"]:
    """The log of the largest magnitude in each window."""
    return jnp.log(jnp.max(jnp.abs(weight), axis=3, initial=0.0))


def balance(
    layers: Sequence[Layers],
    start: Float[Array, " channels"],
    *,
    limit: float = 1e6,
    tolerance: float = 1e-5,
    max_sweeps: int = 1000,
) -> Balance:
    r"""Equal ranges on both sides of every channel.

    With $r^1_i$ the largest magnitude that makes channel $i$ and $r^2_i$ the largest that
    reads it, both in present scales, $s_i \leftarrow s_i \sqrt{r^1_i / r^2_i}$ until the
    largest $|\log r^1_i / r^2_i|$ is below `tolerance`. A channel that is dead on either
    side keeps its scale, and no scale leaves `1/limit … limit`.

    In log s the step is monotone, adds what is added to all its arguments, and so never
    takes two points apart in the maximum norm: averaged steps converge, and Anderson's
    acceleration makes that quick.

    Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
    Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, section 4.1, all layers at
    once instead of pair by pair.
    """
    bound = float(np.log(limit))

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gap = range_gap(layers, x)
        return jnp.clip(x + gap / 2, -bound, bound), gap

    found = anderson(step, start, tolerance=tolerance / 2, max_steps=max_sweeps)
    return Balance(*found)


def range_gap(
    layers: Sequence[Layers], x: Float[Array, " channels"]
) -> Float[Array, " channels"]:
    """log r1/r2 of every channel; zero for one that is dead on either side, or fixed."""
    made, read = [], []
    for log_range, inputs, outputs in layers:
        ins, outs = log_scales(x, inputs), log_scales(x, outputs)
        made.append(jnp.max(log_range + ins[..., None], axis=2) - outs)
        read.append(jnp.max(log_range - outs[:, :, None], axis=3) + ins)
    r1 = _largest(made, [layer.outputs for layer in layers], x)
    r2 = _largest(read, [layer.inputs for layer in layers], x)
    alive = jnp.isfinite(r1) & jnp.isfinite(r2)
    gap = jnp.where(alive, r1, 0.0) - jnp.where(alive, r2, 0.0)
    return gap.at[-1].set(0.0)


def _largest(
    values: list[jax.Array], indices: list[np.ndarray], x: jax.Array
) -> jax.Array:
    """The largest value at each entry of `x`."""
    rows = [row.reshape(-1) for index in indices for row in index]
    flat = [v.reshape(-1) for v, i in zip(values, indices, strict=True) for _ in i]
    lowest = jnp.full(x.shape, -jnp.inf, x.dtype)
    return lowest.at[np.concatenate(rows)].max(jnp.concatenate(flat))
