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
    nearest_levels,
    steps_of,
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
        shared: the axes along which there is one scale, for `refit`.

    Returns:
        The rounded weight, its grid, both losses and the number of sweeps.
    """
    target = weight if target is None else target
    problem = _Problem(target, gram, _ordered(gram, order))
    steps = steps_of(grid, weight.shape[1])
    nearest = nearest_levels(weight, steps)
    before = problem.error(nearest, grid.scale)
    levels, scale, turns = nearest, grid.scale, jnp.int32(0)
    matrix = problem.matrix
    if start == "gptq":
        upper = jnp.swapaxes(damped_cholesky(matrix, damping), 1, 2)
        levels = problem.swept(upper, nearest, grid)
        gained = problem.error(levels, scale) < before
        levels = jnp.where(gained[:, None], levels, nearest)

    def turn(state: tuple) -> tuple:
        levels, scale, _, turns = state
        new = problem.swept(matrix, levels, grid._replace(scale=scale))
        moved = jnp.any(new != levels)
        if refit:
            old, scale = scale, refit_scales(new, scale, gram, target, shared)
            moved |= jnp.any(jnp.abs(scale - old) > SETTLED * old)
        return new, scale, moved, turns + 1

    state = (levels, scale, jnp.asarray(True), turns)
    unfinished = lambda state: state[2] & (state[3] < sweeps)
    levels, scale, _, turns = lax.while_loop(unfinished, turn, state)
    after = problem.error(levels, scale)
    gained = _lower(after, before, shared if refit else ())
    scale = jnp.where(gained[:, None], scale, grid.scale)
    levels = jnp.where(gained[:, None], levels, nearest)
    rounded = along_inputs(scale, weight.shape[1]) * levels
    loss = jnp.where(gained, after, before)
    return Rounded(rounded, grid._replace(scale=scale), loss, before, turns)


class _Problem(NamedTuple):
    """What is to be approached, in what form, and the inputs in the order of a sweep."""

    target: jax.Array
    gram: jax.Array
    places: jax.Array

    @property
    def matrix(self) -> jax.Array:
        """The Gram matrix in that order."""
        return _sorted(_sorted(self.gram, self.places, 1), self.places, 2)

    def error(self, levels: jax.Array, scale: jax.Array) -> Float[Array, "groups outs"]:
        step = along_inputs(scale, levels.shape[1])
        return quadratic(self.target - step * levels, self.gram)

    def swept(self, matrix: jax.Array, levels: jax.Array, grid: LevelGrid) -> jax.Array:
        """The levels after a sweep with the matrix, which stands in the order."""
        ins = levels.shape[1]
        given = (self.target, levels, *steps_of(grid, ins))
        target, levels, *steps = (_sorted(v, self.places, 1) for v in given)
        new = _sweep(matrix, target, levels, Steps(*steps))
        back = jnp.argsort(self.places)[:, :ins, None]
        return jnp.take_along_axis(new, back, axis=1)


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

    What the inputs of a block change is put into the rest by one product of matrices.
    """
    size = matrix.shape[1]
    number = math.ceil(size / BLOCK)
    length = size // number
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    live = diagonal > DEAD * jnp.max(diagonal, axis=1, keepdims=True)
    inverse = jnp.where(live, HOLD / jnp.where(live, diagonal, 1.0), 0.0)
    pace = inverse[:, :, None] / jnp.where(steps.step > 0, steps.step, 1.0)
    product = partial(jnp.matmul, precision="highest")

    def block(turn: jax.Array, state: tuple) -> tuple:
        first = (number - 1 - turn) * length
        cut = lambda v, axis=1: lax.dynamic_slice_in_dim(v, first, length, axis)
        levels, error = state
        rows = cut(matrix)
        pull = product(rows, error)
        inner, step, rate = cut(rows, 2), cut(steps.step), cut(pace)
        lower, upper = cut(steps.lower), cut(steps.upper)

        def one(turn: jax.Array, state: tuple) -> tuple:
            i = length - 1 - turn
            row = lambda v: lax.dynamic_slice_in_dim(v, i, 1, 1)
            held, change = state
            now = row(pull) + product(row(inner), change)
            old = row(held)
            new = old + jnp.round(now * row(rate))
            new = jnp.clip(new, row(lower), row(upper))
            moved = row(step) * (old - new)
            put = lambda v, u: lax.dynamic_update_slice_in_dim(v, u, i, 1)
            return put(held, new), put(change, moved)

        held = cut(levels)
        held, change = lax.fori_loop(0, length, one, (held, jnp.zeros_like(held)))
        put = lambda v, u: lax.dynamic_update_slice_in_dim(v, u, first, 1)
        return put(levels, held), put(error, cut(error) + change)

    error = target - steps.step * levels
    return lax.fori_loop(0, number, block, (levels, error))[0]
