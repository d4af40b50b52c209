"""Ranges by how many values lie beyond them: min-max and percentile."""

import jax
import jax.numpy as jnp

from jaxmet.numerics.calibrators.calibrator import (
    RangeTarget,
    Scalar,
    in_own_unit,
    whole_range,
)
from jaxmet.numerics.calibrators.histogram_pieces import Values
from jaxmet.numerics.ranges import Extremes


def smallest_to_largest(values: Values, target: RangeTarget) -> Extremes:
    """'minmax': everything, however far out.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: not used.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    del target
    return whole_range(values)


@in_own_unit
def percentile(values: Values, target: RangeTarget) -> Extremes:
    """'percentile': what leaves a share `tail` of the values beyond either end.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: of which `tail` is used: the share beyond either end, from 0 to 0.5.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    return percentile_range(values, target.tail)


def percentile_range(values: Values, tail: Scalar) -> Extremes:
    """The range with a share of at most `tail` of all values beyond either end.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        tail: the share beyond either end, a scalar from 0 to 0.5.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    beyond = tail * jnp.sum(values.number)
    flipped = (-values.right[::-1], -values.left[::-1], values.number[::-1])
    return -_upper(*flipped, beyond), _upper(*values[:3], beyond)


def _upper(
    left: jax.Array, right: jax.Array, count: jax.Array, beyond: jax.Array
) -> jax.Array:
    """Where so many values lie above; summed from above, where it is to be exact."""
    above = jnp.cumsum(count[::-1])[::-1]
    at = jnp.maximum(jnp.sum(above > beyond) - 1, 0)
    share = (beyond - (above[at] - count[at])) / jnp.maximum(count[at], 1e-30)
    return right[at] - jnp.clip(share, 0.0, 1.0) * (right[at] - left[at])
