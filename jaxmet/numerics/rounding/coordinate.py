r"""Descent over the integers of a grid, one input at a time, all outputs at once.

The error is $(\hat W - W^*)^T G (\hat W - W^*)$ for each output. Beside the others the best
value of the weights of input $i$ is

$$W^*_i + \sum_{j \ne i} A_{ij} (W^*_j - \hat W_j) / A_{ii}$$

rounded to the grid and clipped, with $A = G$: a sweep over the inputs never raises the
error (COMQ, [arXiv:2403.07134](https://arxiv.org/abs/2403.07134), 2024). With $A$ the upper
triangular factor of $G = A^T A$ and inputs from last to first, the same sweep rounds each
input knowing that all later ones will make good for it: that is GPTQ (Frantar et al.,
[arXiv:2210.17323](https://arxiv.org/abs/2210.17323), ICLR 2023) without an inverse.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmet.numerics.rounding.levels import (
    LevelGrid,
    Steps,
    along_inputs,
)
from jaxmet.numerics.rounding.quadratic import damped_cholesky, quadratic
from jaxmet.numerics.rounding.scales import refit_scales

STARTS = ("nearest", "gptq")
ORDERS = ("diagonal", "natural")
BLOCK = 64
DEAD = 1e-7  # of the largest diagonal entry: below is only the error of computing it
SETTLED = 1e-4  # the relative change of a scale that is none
HOLD = 1.0 - 1e-5  # a tie, or nearly one, moves nothing

Weight = Float[Array, "groups ins outs"]
Gram = Float[Array, "groups ins ins"]


class Rounded(NamedTuple):
    """Weights on a grid, and their error for each output beside that of nearest rounding."""

    weight: Weight
    grid: LevelGrid
    loss: Float[Array, "groups outs"]
    nearest_loss: Float[Array, "groups outs"]
    sweeps: Int[Array, ""]


@partial(jax.jit, static_argnames=("start", "order", "refit", "shared"))
def coordinate_descent(
    weight: Weight,
    grid: LevelGrid,
    gram: Gram,
    target: Weight | None = None,
    *,
    sweeps: int | Int[Array, ""] = 20,
    start: str = "gptq",
    order: str = "diagonal",
    damping: float | Float[Array, ""] = 0.01,
    refit: bool = False,
    shared: tuple[int, ...] = (),
) -> Rounded:
    """Rounded weights whose error no single input could lower, or after so many sweeps.

    `target` is what the rounded weights should be, the weight itself if not given. The
    error of nearest rounding, which is that of `weight`, is the least that is expected:
    outputs that do not gain keep it. `start` is one of STARTS, of which 'gptq' takes the
    factor with `damping`; `order` is 'diagonal', the inputs with most energy first, or
    'natural', the last input first. With `refit` each sweep also gives the integers their
    best scales, one for all that lies along the `shared` axes of the grid.

    Args:
        weight: the float weight.
        grid: scale, zero point and ends.
        gram: the Gram matrix of the inputs.
        target: what the rounded weights should be; default None: the weight.
        sweeps: how many sweeps at most; default 20.
        start: where the descent starts, 'gptq' by default.
        order: the order of the inputs in a sweep, 'diagonal' by default.
        damping: what 'gptq' adds to the diagonal, as a share of its mean; default 0.01.
        refit: whether scales are fitted to the integers after each sweep; default False.
        shared: the axes along which there is one scale, for `refit`; default none.

    Returns:
        The rounded weight, its grid, both losses and the number of sweeps.
    """
    target = weight if target is None else target
    ins, blocks = weight.shape[1], grid.scale.shape[1]
    places = _ordered(gram, order)
    back = jnp.argsort(places)[:, :ins, None]
    natural = lambda v: jnp.take_along_axis(v, back, axis=1)
    put = partial(_sorted, index=places, axis=1)
    # One scale per channel needs no copy for each input.
    rows = (lambda v: v) if blocks == 1 else (lambda v: put(along_inputs(v, ins)))
    low, high = (jnp.asarray(end, grid.scale.dtype) for end in (grid.low, grid.high))
    bounds = rows(low - grid.zero_point), rows(high - grid.zero_point)
    matrix, goal = _sorted(put(gram), places, 2), put(target)
    nearest = jnp.round(put(weight) / _no_zero(rows(grid.scale)))
    nearest = jnp.clip(nearest, *bounds)
    # The first turn is GPTQ's: a sweep with the factor, as turn -1.
    factor = None
    if start == "gptq":
        factor = jnp.swapaxes(damped_cholesky(matrix, damping), 1, 2)

    def error(levels: jax.Array, scale: jax.Array) -> Float[Array, "groups outs"]:
        return quadratic(goal - rows(scale) * levels, matrix)

    before = error(nearest, grid.scale)

    def begun(new: jax.Array, levels: jax.Array, scale: jax.Array) -> tuple:
        gained = error(new, scale) < before
        return jnp.where(gained[:, None], new, levels), scale, jnp.asarray(True)

    def moved(new: jax.Array, levels: jax.Array, scale: jax.Array) -> tuple:
        other = jnp.any(new != levels)
        if not refit:
            return new, scale, other
        own = (new, scale, matrix, goal)
        if blocks > 1:
            own = (natural(new), scale, gram, target)
        fitted = refit_scales(*own, shared)
        other |= jnp.any(jnp.abs(fitted - scale) > SETTLED * scale)
        return new, fitted, other

    def turn(state: tuple) -> tuple:
        levels, scale, _, turns = state
        steps = Steps(rows(scale), *bounds)
        if factor is None:
            new = _sweep(matrix, goal, levels, steps)
            return *moved(new, levels, scale), turns + 1
        # One sweep in the program for both matrices: it takes longest to compile.
        new = _sweep(jnp.where(turns < 0, factor, matrix), goal, levels, steps)
        return *lax.cond(turns < 0, begun, moved, new, levels, scale), turns + 1

    turns = jnp.int32(0 if factor is None else -1)
    state = (nearest, grid.scale, jnp.asarray(True), turns)
    unfinished = lambda state: state[2] & (state[3] < sweeps)
    levels, scale, _, turns = lax.while_loop(unfinished, turn, state)
    after = error(levels, scale)
    gained = _lower(after, before, shared if refit else ())
    scale = jnp.where(gained[:, None], scale, grid.scale)
    levels = natural(jnp.where(gained[:, None], levels, nearest))
    rounded = along_inputs(scale, ins) * levels
    loss = jnp.where(gained, after, before)
    return Rounded(rounded, grid._replace(scale=scale), loss, before, turns)


def _no_zero(step: jax.Array) -> jax.Array:
    return jnp.where(step > 0, step, 1.0)


def _lower(
    new: jax.Array, old: jax.Array, shared: tuple[int, ...]
) -> Bool[Array, "groups outs"]:
    """Which outputs have a lower error, all that share a scale together."""
    axes = tuple(axis // 2 for axis in shared if axis != 1)  # of (groups, blocks, outs)
    gained = jnp.sum(new, axes, keepdims=True) < jnp.sum(old, axes, keepdims=True)
    return jnp.broadcast_to(gained, new.shape)


def _ordered(gram: Gram, order: str) -> Int[Array, "groups padded"]:
    """The inputs in the order opposite to that of a sweep; some beyond the last fill up."""
    groups, ins, _ = gram.shape
    number = math.ceil(ins / BLOCK)
    padded = number * math.ceil(ins / number)
    if order == "natural":
        return jnp.broadcast_to(jnp.arange(padded), (groups, padded))
    energy = jnp.diagonal(gram, axis1=1, axis2=2)
    return jnp.argsort(jnp.pad(energy, ((0, 0), (0, padded - ins))), axis=1)


def _sorted(v: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """An array with the inputs along an axis in this order, zeros where they fill up."""
    more = index.shape[1] - v.shape[axis]
    v = jnp.pad(v, [(0, more if a == axis else 0) for a in range(3)])
    return jnp.take_along_axis(v, jnp.expand_dims(index, 3 - axis), axis=axis)


def _sweep(matrix: Gram, target: Weight, levels: Weight, steps: Steps) -> Weight:
    """The levels after every input in turn, from the last, took its best ones.

    What the inputs of a block change is put into the rest by one product of matrices. Steps
    that are the same for all inputs have one row.
    """
    size = matrix.shape[1]
    number = math.ceil(size / BLOCK)
    length = size // number
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    live = diagonal > DEAD * jnp.max(diagonal, axis=1, keepdims=True)
    inverse = jnp.where(live, HOLD / jnp.where(live, diagonal, 1.0), 0.0)[:, :, None]
    product = partial(jnp.matmul, precision="highest")

    def part(v: jax.Array, first: jax.Array, length: int, axis: int = 1) -> jax.Array:
        if v.shape[axis] == 1:
            return v
        return lax.dynamic_slice_in_dim(v, first, length, axis)

    def block(turn: jax.Array, state: tuple) -> tuple:
        first = (number - 1 - turn) * length
        cut = lambda v, axis=1: part(v, first, length, axis)
        levels, error = state
        rows = cut(matrix)
        pull = product(rows, error)
        inner, pace, own = cut(rows, 2), cut(inverse), Steps(*map(cut, steps))

        def one(turn: jax.Array, state: tuple) -> tuple:
            i = length - 1 - turn
            row = lambda v: part(v, i, 1)
            held, change = state
            now = row(pull) + product(row(inner), change)
            step, lower, upper = map(row, own)
            old = row(held)
            new = old + jnp.round(now * (row(pace) / _no_zero(step)))
            new = jnp.clip(new, lower, upper)
            put = lambda v, u: lax.dynamic_update_slice_in_dim(v, u, i, 1)
            return put(held, new), put(change, step * (old - new))

        held = cut(levels)
        held, change = lax.fori_loop(0, length, one, (held, jnp.zeros_like(held)))
        put = lambda v, u: lax.dynamic_update_slice_in_dim(v, u, first, 1)
        return put(levels, held), put(error, cut(error) + change)

    error = target - steps.step * levels
    return lax.fori_loop(0, number, block, (levels, error))[0]
