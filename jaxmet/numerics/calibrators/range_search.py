"""The cheapest range by a price that a grid has."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.numerics.calibrators.calibrator import RangeTarget, Scalar
from jaxmet.numerics.ranges import Extremes, grid_between

Objective = Callable[[Scalar, Scalar], Scalar]  # of a scale and a zero point


def cheapest_of(
    price: Objective, ranges: tuple[jax.Array, jax.Array], target: RangeTarget
) -> jax.Array:
    """The first of the cheapest ranges, each priced with the grid that it would get.

    Args:
        price: what a scale and a zero point cost, a function of two scalars to one.
        ranges: the lower and the upper ends of the candidates, (n,) each.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The index of the cheapest candidate, a scalar.
    """

    def priced(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        grid = grid_between(*candidate, *target.ends, symmetric=target.symmetric)
        return price(*grid)

    return jnp.argmin(lax.map(priced, ranges))


def cheapest_range(
    price: Objective, least: Scalar, most: Scalar, target: RangeTarget
) -> Extremes:
    """The cheapest range within one that includes zero; equals leave it whole.

    A coarse net of shares of either end, from 1 down in equal ratios, then two finer ones
    around the best. A symmetric grid has one share for both ends.

    Args:
        price: what a scale and a zero point cost, a function of two scalars to one.
        least: the lower end of the whole range, a scalar up to zero.
        most: the upper end, a scalar from zero on.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    symmetric = target.symmetric
    coarse = np.arange(33 if symmetric else 13)
    one, two = (coarse, coarse) if symmetric else _pairs(coarse)
    one, two = (jnp.asarray(n, least.dtype) for n in (one, two))
    middle, finer = (16, 0.075) if symmetric else (6, 0.2)

    def narrowed(point: tuple[jax.Array, ...], _: Any) -> tuple[Any, None]:
        down, up, step, start = point
        down = jnp.minimum(down - step * (one - start), 0.0)
        up = jnp.minimum(up - step * (two - start), 0.0)
        ranges = jnp.exp2(down) * least, jnp.exp2(up) * most
        best = cheapest_of(price, ranges, target)
        return (down[best], up[best], step * finer, jnp.full_like(start, middle)), None

    zero = jnp.zeros_like(least)  # shares are kept as logarithms
    begin = (zero, zero, zero + (0.3 if symmetric else 0.5), zero)
    (down, up, *_), _ = lax.scan(narrowed, begin, length=3)
    return jnp.exp2(down) * least, jnp.exp2(up) * most


def _pairs(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(steps, steps.size), np.tile(steps, steps.size)
