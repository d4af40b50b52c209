r"""Grids whose ends train: what keeps them valid after any step of an optimizer.

A learned number goes through a function that makes it valid and whose derivative never
vanishes, so that no step can leave it where no gradient brings it back. Scales are
$|s|$; zero points are rounded and ends clipped with the gradient of the identity.

Esser et al., [Learned Step Size Quantization](https://arxiv.org/abs/1902.08153), ICLR
2020, divide the gradient of a scale by $\sqrt{N\,h}$, with $N$ the values that share
the scale and $h$ the highest integer: weights and scales then move at one pace.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmet.numerics.ranges import SCALE_FLOOR, Extremes, Numbers, through

SCALE_CEILING = 2.0**100
"""No scale is larger: with 16 bits the end of its grid is still a float32."""


@jax.custom_jvp
def positive(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$|s|$, kept between 2⁻⁶⁰ and 2¹⁰⁰; its derivative is the sign, 1 at zero.

    NaN stays NaN.

    Args:
        scale: scales, a float array of any shape.

    Returns:
        Positive scales of the same shape and dtype.
    """
    return jnp.clip(jnp.abs(scale), SCALE_FLOOR, SCALE_CEILING)


@positive.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (scale,), (moved,) = primals, tangents
    return positive(scale), jnp.where(scale < 0, -moved, moved)


@jax.custom_jvp
def gradient_times(
    x: Float[Array, "*shape"], factor: Numbers
) -> Float[Array, "*shape"]:
    """`x`, with its gradient multiplied by `factor`.

    Args:
        x: a float array of any shape.
        factor: a number, or an array that broadcasts to the shape of `x`.

    Returns:
        `x` itself.
    """
    del factor
    return x


@gradient_times.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, factor = primals
    return gradient_times(x, factor), tangents[0] * jnp.asarray(factor, x.dtype)


def lsq_factor(sharing: int, high: Numbers) -> Float[Array, ""]:
    r"""$1/\sqrt{N\,h}$ for `sharing` values on a grid whose highest integer is `high`.

    Args:
        sharing: N, how many values share the scale; at least 1 is used.
        high: h, the highest integer of the grid.

    Returns:
        The factor, a float32 scalar.
    """
    return lax.rsqrt(jnp.float32(max(sharing, 1)) * jnp.asarray(high, jnp.float32))


def zero_point_on(
    zero_point: Float[Array, "*shape"], low: Numbers, high: Numbers
) -> Float[Array, "*shape"]:
    """The nearest integer of the grid, with the gradient of the identity.

    Args:
        zero_point: zero points, a float array of any shape.
        low: the lowest integer of the grid.
        high: the highest integer of the grid.

    Returns:
        Whole numbers from `low` to `high`, of the same shape and dtype.
    """
    low, high = (jnp.asarray(end, zero_point.dtype) for end in (low, high))
    return through(zero_point, jnp.clip(jnp.round(zero_point), low, high))


def grid_of_learned_range(
    minimum: Float[Array, "*shape"] | None,
    maximum: Float[Array, "*shape"],
    low: Numbers,
    high: Numbers,
) -> Extremes:
    r"""Scale and zero point of the range that `minimum` and `maximum` state.

    Asymmetric: $\Delta = (M-m)/(h-l)$, $z = \mathrm{round}(l-m/\Delta)$, with $m$ made at
    most and $M$ at least zero, and $z$ kept on the grid. Symmetric (`minimum` of `None`):
    $\Delta = |M|/h$. Gradients go through as if nothing had been clipped or rounded. These
    are the parameters of AIMET's range learning.

    Args:
        minimum: m, the lower ends, a float array; None for a symmetric grid.
        maximum: M, the upper ends, a float array of the same shape.
        low: l, the lowest integer of the grid.
        high: h, the highest integer of the grid.

    Returns:
        Scale and zero point, of the shape of `maximum`.
    """
    low, high = (jnp.asarray(end, maximum.dtype) for end in (low, high))
    if minimum is None:
        scale = positive(maximum / high)
        return scale, jnp.zeros_like(scale)
    # zero must be in the range, or padding and ReLU outputs would not be representable
    least = through(minimum, jnp.clip(minimum, -SCALE_CEILING, 0.0))
    most = through(maximum, jnp.clip(maximum, 0.0, SCALE_CEILING))
    scale = positive((most - least) / (high - low))
    return scale, zero_point_on(low - least / scale, low, high)
