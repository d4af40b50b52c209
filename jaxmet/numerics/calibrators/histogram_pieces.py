"""A histogram as a calibrator reads it: pieces in which values lie evenly."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmet.numerics.histogram import Histogram


class Values(NamedTuple):
    """A histogram: sorted bins, in each of which values lie evenly from `left` to `right`.

    A bin without width is one value: up to 2,048 values of a weight stand for themselves. Of
    the `number` of values in a bin `rounded` are not exactly zero: those that are cost nothing
    on any grid. The first left and the last right end are the smallest and largest value.
    """

    left: Float[Array, "*layers pieces"]
    right: Float[Array, "*layers pieces"]
    number: Float[Array, "*layers pieces"]
    rounded: Float[Array, "*layers pieces"]


def values_of(h: Histogram) -> Values:
    """A histogram as pieces, cut at the ends of the data: a constant has no width.

    Args:
        h: a histogram; leading axes are histograms side by side.

    Returns:
        The bins as `Values`, float arrays (*layers, bins).
    """
    ends = jnp.clip(h.edges, h.low[..., None], h.high[..., None])
    at_zero = h.edges[..., :-1] == 0
    rounded = h.counts - jnp.where(at_zero, h.zeros[..., None], 0.0)
    return Values(ends[..., :-1], ends[..., 1:], h.counts, jnp.maximum(rounded, 0.0))
