r"""The share of its range that each channel, block or tensor had best cover.

Of $K$ grids over the shares $k/K$ of the range from the smallest weight to the largest, the
one whose output is nearest to the float one: sequential MSE, the search of OMSE by the
output instead of the weight. Blocks are compared by the sums over their own inputs alone.

Choukroun et al., [Low-bit Quantization of Neural Networks for Efficient
Inference](https://arxiv.org/abs/1902.06822), ICCVW 2019, for the search; AIMET for the form.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmet.numerics.ranges import grid_between
from jaxmet.numerics.rounding.levels import LevelGrid, Number, nearest

LOSSES = ("mse", "l1", "sqnr")
AT_ONCE = 2**22  # numbers held by the candidates that are tried together

Weight = Float[Array, "groups ins outs"]
Rows = Float[Array, "groups rows ins"]
PerBlock = Float[Array, "groups blocks outs"]


class Searched(NamedTuple):
    """The best grid, its share k/K as k, and the errors of k = 1 … K.

    Axes along which the choice is shared have size 1 in `best` and `errors`.
    """

    grid: LevelGrid
    best: Int[Array, "groups blocks outs"]
    errors: Float[Array, "candidates groups blocks outs"]


@partial(jax.jit, static_argnames=("symmetric", "blocks", "candidates", "shared"))
def search_scales(
    weight: Weight,
    low: Number,
    high: Number,
    gram: Float[Array, "groups ins ins"],
    cross: Float[Array, "groups ins ins"] | None = None,
    *,
    target: Weight | None = None,
    symmetric: bool,
    blocks: int = 1,
    candidates: int = 20,
    shared: tuple[int, ...] = (),
) -> Searched:
    r"""The shares of least squared error, from the Gram matrix of the inputs.

    The error of a block is $e^T G e - 2 e^T (C - G) W$ with $e = \hat W - W$, which is
    $E|xW - \hat x\hat W|^2$ less a constant, with its own rows and columns of $G$ and $C$;
    given a `target` instead of `cross`, it is $e^T G e$ with $e$ the distance to that.
    `shared` are the axes of (groups, blocks, outs) along which there is one choice: errors
    are sums over them, and ranges extremes.

    Args:
        weight: the float weight.
        low: the lowest integer.
        high: the highest integer.
        gram: the Gram matrix of the quantized inputs.
        cross: their products with the float inputs; default None: the same as `gram`.
        target: what the rounded weights should be, instead of `cross`; default None.
        symmetric: whether zero is the middle of the grid.
        blocks: how many blocks the inputs are divided into; default 1.
        candidates: how many shares of the range are tried; default 20.
        shared: the axes of (groups, blocks, outs) along which there is one choice; default none.

    Returns:
        The best grid, its share, and the errors of all candidates.
    """
    target = weight if target is None else target
    own = _own(gram, blocks)
    apart = _apart(target, blocks)
    matmul = partial(jnp.matmul, precision="highest")
    pull = None
    if cross is not None:
        pull = matmul(_own(cross, blocks) - own, _apart(weight, blocks))

    def price(rounded: Weight) -> PerBlock:
        error = _apart(rounded, blocks) - apart
        slope = matmul(own, error)
        if pull is not None:
            slope = slope - 2 * pull
        return jnp.sum(error * slope, axis=2)

    return _search(price, weight, (low, high), symmetric, blocks, candidates, shared)


@partial(
    jax.jit, static_argnames=("symmetric", "blocks", "candidates", "shared", "loss")
)
def search_scales_by_rows(
    weight: Weight,
    low: Number,
    high: Number,
    rows: Rows,
    float_rows: Rows | None = None,
    *,
    loss: str = "mse",
    symmetric: bool,
    blocks: int = 1,
    candidates: int = 20,
    shared: tuple[int, ...] = (),
) -> Searched:
    r"""The same from inputs themselves, for any of LOSSES.

    'l1' is the mean of $|y - \hat y|$, 'sqnr' is $-10\log_{10} \sum y^2/\sum (y-\hat y)^2$,
    in decibel before it is summed over `shared` axes.

    Args:
        weight: the float weight, (groups, ins, outs).
        low: the lowest integer of the grid.
        high: the highest integer of the grid.
        rows: the inputs of the quantized network, a float array (groups, rows, ins).
        float_rows: those of the float network; default None: the same.
        loss: 'mse' (the default), 'l1' or 'sqnr'.
        symmetric: whether the grid has no zero point.
        blocks: how many scales lie along the inputs; default 1.
        candidates: how many shares of the range are tried; default 20.
        shared: the axes of (groups, blocks, outs) along which there is one scale; default none.

    Returns:
        The best grid, its share k/K as k, and the losses of all candidates.
    """
    inputs = _apart_rows(rows, blocks)
    matmul = partial(jnp.matmul, precision="highest")
    other = inputs if float_rows is None else _apart_rows(float_rows, blocks)
    output = matmul(other, _apart(weight, blocks))  # (groups, blocks, rows, outs)
    power = jnp.mean(jnp.square(output), axis=2)

    def price(rounded: Weight) -> PerBlock:
        error = output - matmul(inputs, _apart(rounded, blocks))
        if loss == "l1":
            return jnp.mean(jnp.abs(error), axis=2)
        noise = jnp.mean(jnp.square(error), axis=2)
        if loss == "mse":
            return noise
        least = jnp.finfo(noise.dtype).tiny
        ratio = jnp.maximum(power, least) / jnp.maximum(noise, least)
        return -10 * jnp.log10(ratio)

    return _search(price, weight, (low, high), symmetric, blocks, candidates, shared)


def _search(
    price: Callable[[Weight], PerBlock],
    weight: Weight,
    ends: tuple[Number, Number],
    symmetric: bool,
    blocks: int,
    candidates: int,
    shared: tuple[int, ...],
) -> Searched:
    apart = _apart(weight, blocks)
    least, most = jnp.min(apart, axis=2), jnp.max(apart, axis=2)
    least = jnp.min(least, axis=shared, keepdims=True)
    most = jnp.max(most, axis=shared, keepdims=True)
    every = (weight.shape[0], blocks, weight.shape[2])
    low, high = (jnp.asarray(end, weight.dtype) for end in ends)

    def grid_of(k: jax.Array) -> LevelGrid:
        share = k.astype(weight.dtype) / candidates
        ranges = least * share, most * share
        found = grid_between(*ranges, low, high, symmetric=symmetric)
        scale, zero_point = (jnp.broadcast_to(v, every) for v in found)
        return LevelGrid(scale, zero_point, low, high)

    def error(k: jax.Array) -> jax.Array:
        each = price(nearest(weight, grid_of(k)))
        return jnp.sum(each, axis=shared, keepdims=True)

    # From wide to narrow: of equals the widest wins.
    shares = jnp.arange(candidates, 0, -1).reshape(-1, 1, 1, 1)
    together = max(1, min(candidates, AT_ONCE // max(weight.size, 1)))
    errors = lax.map(error, shares, batch_size=together)
    best = candidates - jnp.argmin(errors, axis=0)
    return Searched(grid_of(best), best, errors[::-1])


def _apart(weight: Weight, blocks: int) -> Float[Array, "groups blocks length outs"]:
    groups, ins, outs = weight.shape
    return weight.reshape(groups, blocks, ins // blocks, outs)


def _apart_rows(rows: Rows, blocks: int) -> Float[Array, "groups blocks rows length"]:
    groups, number, ins = rows.shape
    split = rows.reshape(groups, number, blocks, ins // blocks)
    return jnp.swapaxes(split, 1, 2)


def _own(gram: jax.Array, blocks: int) -> Float[Array, "groups blocks length length"]:
    """The part of a Gram matrix that each block sees."""
    groups, ins, _ = gram.shape
    length = ins // blocks
    split = gram.reshape(groups, blocks, length, blocks, length)
    return jnp.moveaxis(jnp.diagonal(split, axis1=1, axis2=3), 3, 1)
