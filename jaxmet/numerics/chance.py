r"""What the rounding errors that weights happen to have add to a layer's outputs.

Expected noise takes errors as random. But a weight has one error, few of them meet in an
output, and they meet in the same way at every position of every image. With $E_{io}$ the
sum over the window of rounded minus exact, in original units, and with $m_i$, $v_i$ mean and
variance of input $i$, an output errs by the constant $\sum_i m_i E_{io}$ and by what varies
about it (taps of a window read much the same, inputs are taken to vary independently): where
an error of variance one of output $o$ is worth $g_o$, together by

$$\sum_o g_o \Big[\big(\sum_i m_i E_{io}\big)^2 + \sum_i v_i E_{io}^2\Big].$$
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxmet.numerics.scaling import dealt

DRAWS = 24
SPREAD = 0.01  # moves the largest of 8-bit weights by a step


class Rounded(NamedTuple):
    """Weights of one shape, their inputs, and what errors of their outputs are worth.

    The largest magnitude, of all or with `per_channel` of those that make an output, is
    `levels` steps from zero.
    """

    weight: Float[Array, "layers groups ins outs window"]
    mean: Float[Array, "layers groups ins"]
    variance: Float[Array, "layers groups ins"]
    worth: Float[Array, "layers groups outs"]
    levels: Float[np.ndarray, " layers"]
    per_channel: Bool[np.ndarray, " layers"]


class Drawn(NamedTuple):
    """The best of several draws, and the values there and at the first."""

    x: Float[Array, " channels"]
    value: Float[Array, ""]
    first: Float[Array, ""]


def rounding_errors(
    weight: Float[Array, "layers groups ins outs window"],
    ins: Float[Array, "layers groups ins"],
    outs: Float[Array, "layers groups outs"],
    levels: Float[np.ndarray, " layers"],
    per_channel: Bool[np.ndarray, " layers"],
) -> Float[Array, "layers groups ins outs"]:
    """Rounded minus exact, summed over the window, in original units.

    What is rounded is the weight times exp(ins - outs); its grid is symmetric.
    """
    factor = jnp.exp(ins)[..., None] * jnp.exp(-outs)[:, :, None]
    scaled = weight * factor[..., None]
    own = jnp.max(jnp.abs(scaled), axis=(2, 4), keepdims=True, initial=0.0)
    whole = jnp.max(own, axis=(1, 3), keepdims=True)
    apart = jnp.asarray(per_channel).reshape(-1, 1, 1, 1, 1)
    steps = jnp.asarray(levels, weight.dtype).reshape(-1, 1, 1, 1, 1)
    step = jnp.where(apart, own, whole) / steps
    step = jnp.where(step > 0, step, 1.0)
    return jnp.sum(jnp.round(scaled / step) * step - scaled, axis=4) / factor


def added_noise(
    every: Sequence[Rounded],
    ins: Float[Array, " ins"],
    outs: Float[Array, " outs"],
) -> Float[Array, ""]:
    """What the errors of all weights add at these log scales of inputs and outputs."""
    shapes = [one.weight.shape for one in every]
    each_in = dealt(ins, [s[:3] for s in shapes])
    each_out = dealt(outs, [(*s[:2], s[3]) for s in shapes])
    total = jnp.zeros((), ins.dtype)
    for one, i, o in zip(every, each_in, each_out, strict=True):
        error = rounding_errors(one.weight, i, o, one.levels, one.per_channel)
        constant = _over_inputs(error, one.mean)
        varying = _over_inputs(jnp.square(error), one.variance)
        total = total + jnp.sum(one.worth * (jnp.square(constant) + varying))
    return total


def least_of_draws(
    function: Callable[[jax.Array], jax.Array],
    start: Float[Array, " channels"],
    free: Bool[Array, " channels"],
    key: Key[Array, ""],
    *,
    lowest: Float[Array, " channels"],
    highest: Float[Array, " channels"],
    draws: int = DRAWS,
    spread: float = SPREAD,
) -> Drawn:
    """The best of `start` and other points near it.

    What is `free` moves by a normal distance of standard deviation `spread`, within
    `lowest` … `highest`.
    """
    keys = jax.random.split(key, draws)

    def point(number: jax.Array) -> jax.Array:
        step = spread * jax.random.normal(keys[number], start.shape, start.dtype)
        moved = jnp.clip(start + step, lowest, highest)
        return jnp.where(free & (number > 0), moved, start)

    values = jax.lax.map(lambda number: function(point(number)), jnp.arange(draws))
    best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    return Drawn(point(best), values[best], values[0])


def _over_inputs(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.einsum("lgio,lgi->lgo", matrix, vector, precision="highest")
