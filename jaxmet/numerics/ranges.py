r"""From the range of a tensor to the scale and zero point of its grid.

The convention is $\hat x = \Delta\,(q - z)$ with $q$ an integer of the grid. An
asymmetric grid is stored unsigned, $q \in [0, 2^b-1]$, and $z$ is the integer that
stands for zero; a symmetric grid has $z = 0$.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

from jaxmet.numerics.grid import grid_ends

SCALE_FLOOR = 2.0**-60
"""No scale is smaller: about 1e-18. The product of two is still a normal float32."""

Numbers: TypeAlias = Num[Array, "..."] | Num[np.ndarray, "..."] | float | int
Extremes: TypeAlias = tuple[Float[Array, "..."], Float[Array, "..."]]
Ends: TypeAlias = tuple[Numbers, Numbers]


def grid_of_range(
    minimum: Numbers,
    maximum: Numbers,
    *,
    bits: int,
    symmetric: bool,
    signed: bool = True,
    narrow: bool = True,
) -> Extremes:
    r"""Scale and zero point of the grid of $b$ bits that covers a range.

    Asymmetric, with the range made to include zero: $\Delta = (\max-\min)/(2^b-1)$ and
    $z = \mathrm{round}(-\min/\Delta)$ within the grid, stored unsigned whatever
    `signed` and `narrow` say. Symmetric, signed and narrow:
    $\Delta = \max(|\min|,|\max|)/(2^{b-1}-1)$ and $z = 0$; not narrow, the extra
    negative integer is used, $\Delta = \max(\max/(2^{b-1}-1), -\min/2^{b-1})$.
    Symmetric and unsigned, negative values are given up: $\Delta = \max/(2^b-1)$.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), section 2.1.

    Args:
        minimum: the lower ends of ranges, any shape.
        maximum: the upper ends, of the same shape.
        bits: the width: 2 to 16, or 32.
        symmetric: whether zero is the middle of the grid.
        signed: whether a symmetric grid has negative integers; default True.
        narrow: whether a signed grid leaves out its lowest integer; default True.

    Returns:
        Scale and zero point, of the shape of the ranges.
    """
    ends = grid_ends(bits, signed=symmetric and signed, narrow=narrow)
    return grid_between(minimum, maximum, *ends, symmetric=symmetric)


@functools.partial(jax.jit, static_argnames="symmetric")
def grid_between(
    minimum: Numbers, maximum: Numbers, low: Numbers, high: Numbers, *, symmetric: bool
) -> Extremes:
    """`grid_of_range` for given grid ends, which may be data.

    Args:
        minimum: the lower ends of ranges, any shape.
        maximum: the upper ends, of the same shape.
        low: the lowest integer.
        high: the highest integer.
        symmetric: whether zero is the middle of the grid.

    Returns:
        Scale and zero point, of the shape of the ranges.
    """
    return _between(jnp, _float(minimum), _float(maximum), low, high, symmetric)


def grid_on_host(
    minimum: Any, maximum: Any, low: int, high: int, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`grid_between` in NumPy, where no program is compiled; equal to the last bit or so.

    Args:
        minimum: the lower ends of ranges, any shape.
        maximum: the upper ends, of the same shape.
        low: the lowest integer.
        high: the highest integer.
        symmetric: whether zero is the middle of the grid.

    Returns:
        Scale and zero point, of the shape of the ranges.
    """
    minimum, maximum = np.asarray(minimum), np.asarray(maximum)
    dtype = max((np.dtype(np.float32), minimum.dtype), key=lambda d: d.itemsize)
    minimum, maximum = minimum.astype(dtype), maximum.astype(dtype)
    scale, zero_point = _between(np, minimum, maximum, low, high, symmetric)
    if symmetric and scale.ndim:  # as XLA divides arrays by a number
        one = dtype.type(1)
        scale = np.maximum(maximum, 0) * (one / dtype.type(high))
        if low < 0:
            below = np.minimum(minimum, 0) * (one / dtype.type(low))
            scale = np.maximum(scale, below)
        scale = np.maximum(scale, dtype.type(SCALE_FLOOR))
    return np.asarray(scale, dtype), np.asarray(zero_point, dtype)


def _between(
    np_: Any, minimum: Any, maximum: Any, low: Any, high: Any, symmetric: bool
) -> tuple[Any, Any]:
    """The grid of ranges, by `numpy` or `jax.numpy`."""
    least, most = np_.minimum(minimum, 0.0), np_.maximum(maximum, 0.0)
    low, high = (np_.asarray(end, least.dtype) for end in (low, high))
    if symmetric:
        below = np_.where(low < 0, least / np_.where(low < 0, low, -1.0), 0.0)
        scale = np_.maximum(np_.maximum(most / high, below), SCALE_FLOOR)
        return scale, np_.zeros_like(scale)
    # Divided first, since the width of an extreme range may not be a float.
    scale = np_.maximum(most / (high - low) - least / (high - low), SCALE_FLOOR)
    return scale, np_.clip(np_.round(low - least / scale), low, high)


def regrid(
    scale: Float[Array, "..."],
    zero_point: Float[Array, "..."],
    old: Ends,
    new: Ends,
    *,
    symmetric: bool,
) -> Extremes:
    """The grid with other ends that covers the same real range.

    Equal ends give back exactly the same numbers.

    Args:
        scale: the steps, any shape.
        zero_point: the integers that stand for zero, of the same shape.
        old: the lowest and highest integer until now.
        new: those from now on.
        symmetric: whether zero is the middle of the grid.

    Returns:
        The new scale and zero point.
    """
    (low, high), (new_low, new_high) = (
        [jnp.asarray(end, scale.dtype) for end in ends] for ends in (old, new)
    )
    if symmetric:
        return scale * (high / new_high), zero_point
    finer = (new_high - new_low) / (high - low)
    moved = new_low + (zero_point - low) * finer
    moved = through(moved, jnp.round(moved))
    return scale * ((high - low) / (new_high - new_low)), moved


@jax.custom_jvp
def through(
    x: Float[Array, "*shape"], value: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`value`, with the gradient going to `x` as if it were `x`.

    Args:
        x: where the gradient goes.
        value: what is returned, of the same shape.

    Returns:
        The numbers of `value`.
    """
    del x
    return value


@through.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return through(*primals), tangents[0]


def minmax(
    x: Float[Array, "..."] | Float[np.ndarray, "..."],
    axis: tuple[int, ...] | None = None,
    *,
    block: int | None = None,
    block_axis: int | None = None,
) -> Extremes:
    """The smallest and largest value, apart for each index of the axes in `axis`.

    The results keep the rank of `x`. With `block`, `block_axis` keeps one pair for
    each `block` neighbours, the last of which may be fewer. Half precision is reduced in
    float32.

    Args:
        x: the values, any shape.
        axis: the axes with ranges of their own; default None: one range.
        block: how many neighbours on `block_axis` share a range; default None.
        block_axis: the axis that is divided into blocks; default None.

    Returns:
        The smallest and the largest value, with size 1 on the reduced axes.
    """

    def of(x: jax.Array, block: int | None) -> Extremes:
        x, others, within = _grouped(x, axis, block, block_axis)
        ends = (end(x, others, keepdims=True) for end in (jnp.min, jnp.max))
        least, most = ends if within is None else (end[within] for end in ends)
        return least, most

    return over_blocks(of, x, block, block_axis)


def over_blocks(
    of: Callable[[jax.Array, int | None], Extremes],
    x: Numbers,
    block: int | None,
    block_axis: int | None,
) -> Extremes:
    """`of(x, block)`, apart for whole blocks and for a shorter last one: nothing is padded.

    Args:
        of: a function of an array and of the length of its blocks that gives two arrays, blocks
            along the same axis.
        x: the values, an array.
        block: how many neighbours are one block; None: there are no blocks.
        block_axis: the axis that is cut into blocks; None: there are none.

    Returns:
        The two arrays that `of` gives, those of the shorter last block appended.
    """
    x = jnp.asarray(x)
    rest = 0 if block is None or block_axis is None else x.shape[block_axis] % block
    if not rest:
        return of(x, block)
    at = (block_axis or 0) % x.ndim
    whole = x.shape[at] - rest
    parts = [(0, whole, block), (whole, x.shape[at], rest)]
    found = [of(lax.slice_in_dim(x, i, j, axis=at), n) for i, j, n in parts if i < j]
    least, most = (jnp.concatenate(ends, axis=at) for ends in zip(*found, strict=True))
    return least, most


def groups_of(
    x: Float[Array, "..."] | Float[np.ndarray, "..."],
    axis: tuple[int, ...] | None = None,
    *,
    block: int | None = None,
    block_axis: int | None = None,
) -> tuple[Float[Array, "groups n"], tuple[int, ...]]:
    """The values whose range `minmax` takes, a row a range; and the shape of the result.

    Blocks fill their axis here.

    Args:
        x: the values, a float array of any shape.
        axis: the axes with ranges of their own; default None: one range for all.
        block: how many neighbours share a range; default None: no blocks.
        block_axis: the axis that is cut into blocks; default None.

    Returns:
        The values as (groups, n), one row per range, and the shape that the ranges have.
    """
    x, others, within = _grouped(x, axis, block, block_axis)
    kept = [a for a in range(x.ndim) if a not in others]
    number = math.prod(x.shape[a] for a in kept)
    shape = tuple(1 if a in others else n for a, n in enumerate(x.shape))
    if within is not None:
        shape = (*shape[: len(within) - 1], *shape[len(within) :])
    return jnp.transpose(x, (*kept, *others)).reshape(number, -1), shape


def _grouped(
    x: Any, axis: tuple[int, ...] | None, block: int | None, block_axis: int | None
) -> tuple[jax.Array, tuple[int, ...], tuple[Any, ...] | None]:
    """The array with blocks apart, the axes that share a range, and what undoes both."""
    x = _float(x)
    kept = {a % x.ndim for a in axis or ()}
    if block is None or block_axis is None:
        return x, tuple(a for a in range(x.ndim) if a not in kept), None
    at = block_axis % x.ndim
    blocks = x.reshape(split_shape(x.shape, at, block))
    others = (*(a + (a > at) for a in range(x.ndim) if a not in kept | {at}), at + 1)
    return blocks, others, (*(slice(None),) * (at + 1), 0)


def split_shape(shape: tuple[int, ...], axis: int, block: int) -> tuple[int, ...]:
    """The shape with one axis split into blocks, which fill it.

    Args:
        shape: the shape of an array.
        axis: the axis that is split, counted from the first.
        block: the length of a block, a divisor of the axis.

    Returns:
        The shape with two axes, blocks and what is in one, in place of `axis`.
    """
    return (*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])


def _float(x: Numbers) -> jax.Array:
    x = jnp.asarray(x)
    half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if half or x.dtype.kind in "iub" else x
