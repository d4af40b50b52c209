"""The range whose grid changes the histogram least: entropy."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxmet.numerics.calibrators.calibrator import (
    RangeTarget,
    Scalar,
    binned,
    in_own_unit,
    whole_range,
)
from jaxmet.numerics.calibrators.histogram_pieces import Values
from jaxmet.numerics.calibrators.range_search import cheapest_range
from jaxmet.numerics.ranges import Ends, Extremes


@binned
@in_own_unit
def entropy(values: Values, target: RangeTarget) -> Extremes:
    """'entropy': where the histogram changes least.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    price = partial(divergence, values, target.ends)
    return cheapest_range(price, *whole_range(values), target)


def divergence(values: Values, ends: Ends, scale: Scalar, zero_point: Scalar) -> Scalar:
    r"""What the grid loses of a histogram: $\sum P \log P/Q$.

    $P$ is the histogram of what is not zero, with what is clipped in the outermost bins
    that are not; $Q$ is that without what is clipped, each step's share spread evenly over
    its bins that hold anything. An empty bin of $Q$ counts as 10⁻⁴ of $P$. A step narrower
    than a bin would seem to lose nothing: infinity.

    Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017.

    Args:
        values: the histogram as `Values`, in bins of one width.
        ends: the lowest and the highest integer.
        scale: the step of the grid, a positive scalar.
        zero_point: the integer that stands for zero, a scalar.

    Returns:
        The divergence in nats, a scalar; infinity for a step narrower than a bin.
    """
    count = values.rounded
    level = jnp.round((values.left + values.right) / 2 / scale) + zero_point
    inside = (level >= ends[0]) & (level <= ends[1])
    kept = jnp.where(inside, count, 0.0)
    pieces = jnp.arange(count.size)
    first, last = jnp.argmax(inside), count.size - 1 - jnp.argmax(inside[::-1])
    p = kept.at[first].add(jnp.sum(jnp.where(level < ends[0], count, 0.0)))
    p = p.at[last].add(jnp.sum(jnp.where(level > ends[1], count, 0.0)))
    step = jnp.cumsum(jnp.diff(level, prepend=level[:1]) != 0)
    sums = partial(jax.ops.segment_sum, segment_ids=step, num_segments=pieces.size)
    held = sums((kept > 0).astype(count.dtype))
    q = jnp.where(kept > 0, sums(kept)[step] / jnp.maximum(held[step], 1.0), 0.0)
    p = p / jnp.maximum(jnp.sum(p), 1e-30)
    q = jnp.maximum(q / jnp.maximum(jnp.sum(q), 1e-30), 1e-4 * p)
    loss = jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.where(p > 0, q, 1.0)), 0.0))
    return jnp.where(scale < jnp.max(values.right - values.left), jnp.inf, loss)
