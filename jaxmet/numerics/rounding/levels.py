r"""The grid of a layer, and its integers.

$\hat W = s\,(\mathrm{clip}(\mathrm{round}(W/s) + z,\ l,\ h) - z)$, as `fake_quant`. Here the
levels $k = q - z$ stand for the integers: $\hat W = s k$ with $l - z \le k \le h - z$.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

Number: TypeAlias = Num[Array, ""] | float | int


class LevelGrid(NamedTuple):
    """Scale and zero point for each block of inputs to an output; one block: per channel.

    The blocks have equal length and follow each other along the inputs.
    """

    scale: Float[Array, "groups blocks outs"]
    zero_point: Float[Array, "groups blocks outs"]
    low: Number
    high: Number


class Steps(NamedTuple):
    """What each weight may become: `step` times an integer between `lower` and `upper`."""

    step: Float[Array, "groups ins outs"]
    lower: Float[Array, "groups ins outs"]
    upper: Float[Array, "groups ins outs"]


def steps_of(grid: LevelGrid, ins: int) -> Steps:
    """The grid, repeated for each input.

    Args:
        grid: scale, zero point and ends of the grid.
        ins: how many inputs there are, a multiple of the number of blocks.

    Returns:
        The step and both bounds of the levels for each weight, (groups, ins, outs) each.
    """
    low, high = (jnp.asarray(end, grid.scale.dtype) for end in (grid.low, grid.high))
    bounds = low - grid.zero_point, high - grid.zero_point
    return Steps(*(along_inputs(v, ins) for v in (grid.scale, *bounds)))


def along_inputs(
    v: Float[Array, "groups blocks outs"], ins: int
) -> Float[Array, "groups {ins} outs"]:
    """What belongs to blocks, repeated for each input.

    Args:
        v: one number per block and output, a float array (groups, blocks, outs).
        ins: how many inputs there are, a multiple of `blocks`.

    Returns:
        The array (groups, ins, outs).
    """
    groups, blocks, outs = v.shape
    split = (groups, blocks, ins // blocks, outs)
    return lax.broadcast_in_dim(v, split, (0, 1, 3)).reshape(groups, ins, outs)


def nearest_levels(
    weight: Float[Array, "groups ins outs"], steps: Steps
) -> Float[Array, "groups ins outs"]:
    """The levels that plain rounding gives.

    Args:
        weight: the float weight, (groups, ins, outs).
        steps: step and bounds of each weight.

    Returns:
        Whole numbers as floats, (groups, ins, outs).
    """
    ratio = lax.div(weight, steps.step)
    return jnp.clip(jnp.round(ratio), steps.lower, steps.upper)


@jax.jit
def nearest(
    weight: Float[Array, "groups ins outs"], grid: LevelGrid
) -> Float[Array, "groups ins outs"]:
    """The weight as plain rounding leaves it.

    Args:
        weight: the float weight.
        grid: scale, zero point and ends.

    Returns:
        The rounded weight.
    """
    steps = steps_of(grid, weight.shape[1])
    return steps.step * nearest_levels(weight, steps)
