r"""Ranges by the squared error of the values on their grid: MSE, and AIMET's SQNR.

The expected squared error of values spread evenly over $a \dots b$ is exact, not that of
the middle: with $t = x/\Delta$ and $f = t - \mathrm{round}(t)$,
$\int (x - \hat x)^2\,dx = \Delta^3\,[\mathrm{round}(t)/12 + f^3/3]$ where nothing is
clipped and $(x - h)^3/3$ beyond an end $h$ of the grid.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmet.numerics.calibrators.calibrator import (
    RangeTarget,
    Scalar,
    in_own_unit,
    whole_range,
)
from jaxmet.numerics.calibrators.histogram_pieces import Values
from jaxmet.numerics.calibrators.range_search import cheapest_of, cheapest_range
from jaxmet.numerics.ranges import Ends, Extremes, grid_between

GAMMA = 3.0
"""What AIMET lets clipping cost, where rounding costs 1."""


@in_own_unit
def mse(values: Values, target: RangeTarget) -> Extremes:
    """'mse': where the mean squared error is least.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    return cheapest_range(
        partial(_noise, values, target.ends, 1.0), *whole_range(values), target
    )


@in_own_unit
def sqnr(values: Values, target: RangeTarget) -> Extremes:
    """'sqnr': the best of AIMET's candidates, with clipping weighted three times.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    price = partial(_noise, values, target.ends, GAMMA)
    ranges = sqnr_candidates(*whole_range(values), target.ends, target.symmetric)
    best = cheapest_of(price, ranges, target)
    return ranges[0][best], ranges[1][best]


def noise(
    values: Values, scale: Scalar, zero_point: Scalar, ends: Ends
) -> tuple[Scalar, Scalar]:
    """Mean squared error of values on a grid, inside it by rounding and by clipping.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        scale: the step of the grid, a positive scalar.
        zero_point: the integer that stands for zero, a scalar.
        ends: the lowest and the highest integer.

    Returns:
        Two scalars: the mean squared error of what lies inside the grid, and that of what is
        clipped.
    """
    least, most = (scale * (end - zero_point) for end in ends)
    a, b = values.left, values.right
    wide = b > a
    density = jnp.where(wide, 1.0 / jnp.where(wide, b - a, 1.0), 0.0)

    def beyond(u: jax.Array, v: jax.Array) -> jax.Array:
        share = jnp.where(wide, (v - u) * density, 1.0)
        return share * (u * u + u * v + v * v) / 3

    clipped = beyond(jnp.maximum(a - most, 0.0), jnp.maximum(b - most, 0.0))
    clipped += beyond(jnp.maximum(least - b, 0.0), jnp.maximum(least - a, 0.0))
    s, t = (jnp.clip(end, least, most) * (1.0 / scale) for end in (a, b))
    m, n = jnp.round(s), jnp.round(t)
    f, g = s - m, t - n
    share = jnp.where(wide, (t - s) * scale * density, 1.0)
    within = share * (f * f + f * g + g * g) / 3
    across = ((n - m) / 12 + (g * g * g - f * f * f) / 3) * scale * density
    inside = scale * scale * jnp.where(m == n, within, across)
    weight = values.rounded / jnp.maximum(jnp.sum(values.number), 1.0)
    return jnp.sum(weight * inside), jnp.sum(weight * clipped)


def _noise(
    values: Values, ends: Ends, gamma: float, scale: Scalar, zero_point: Scalar
) -> Scalar:
    rounding, clipping = noise(values, scale, zero_point, ends)
    return rounding + gamma * clipping


def sqnr_candidates(
    least: Scalar, most: Scalar, ends: Ends, symmetric: bool
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    r"""The ranges among which AIMET's `tf_enhanced` chooses, with clipping at $\gamma = 3$.

    Symmetric, 101 steps $k/100$ of the one that covers everything. Asymmetric, the steps
    $k/16$, $k = 1 \dots 17$, of the one that covers everything, each at 21 offsets, cut to
    the observed range (one wider on both sides is no candidate and repeats the observed
    range), and that itself: 358.

    Args:
        least: the smallest value, a scalar.
        most: the largest value, a scalar.
        ends: the lowest and the highest integer.
        symmetric: whether the grid has no zero point.

    Returns:
        The lower and the upper ends of the candidates, (101,) or (358,) each.
    """
    if symmetric:
        # From wide to narrow: of equals the widest wins.
        shares = jnp.asarray(np.arange(101, 0, -1) / 100, least.dtype)
        return shares * least, shares * most
    steps = ends[1] - ends[0]
    observed, _ = grid_between(least, most, *ends, symmetric=False)
    step = observed * jnp.asarray(np.arange(17, 0, -1) / 16, least.dtype).reshape(-1, 1)
    offset = -steps + jnp.round(steps * jnp.arange(21, dtype=least.dtype) / 20)
    low = (step * offset.reshape(1, -1)).reshape(-1)
    high = low + steps * jnp.repeat(step.reshape(-1), 21)
    wider = (low < least) & (high > most)
    low = jnp.where(wider, least, jnp.maximum(low, least))
    high = jnp.where(wider, most, jnp.minimum(high, most))
    empty = high <= low
    low, high = jnp.where(empty, least, low), jnp.where(empty, most, high)
    return jnp.append(least, low), jnp.append(most, high)
