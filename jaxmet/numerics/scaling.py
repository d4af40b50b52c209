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
    acceleration makes that quick. Where channels go round in a circle (residual blocks)
    several answers may be equally balanced.

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
    layers: Layers, x: Float[Array, " channels"]
) -> Float[Array, " channels"]:
    """log r1/r2 of every channel; zero for one that is dead on either side, or fixed."""
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
    return r1, r2


def _largest(values: jax.Array, index: np.ndarray, x: jax.Array) -> jax.Array:
    """The largest value at each entry of `x`."""
    every = jnp.broadcast_to(values[None], index.shape)
    return jnp.full(x.shape, -jnp.inf, x.dtype).at[index].max(every)
