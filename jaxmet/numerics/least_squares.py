r"""Least squares from products of inputs, which may say little or nothing."""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmet.numerics.rounding.quadratic import damped_cholesky


def solve(
    gram: Float[Array, "*g n n"],
    right: Float[Array, "*g n m"],
    damping: float | Float[Array, ""],
) -> Float[Array, "*g n m"]:
    r"""$(G + \lambda D)^{-1} R$ with D the diagonal of G: as if all inputs had size one.

    What belongs to an input that is always zero is the right side itself, mostly zero.

    Args:
        gram: symmetric matrices G, n by n.
        right: right sides R, n by m.
        damping: λ, as a share of the diagonal.

    Returns:
        The solutions, n by m.
    """
    unit, scale = of_size_one(gram)
    groups = math.prod(gram.shape[:-2])
    flat = lambda v: v.reshape(groups, *v.shape[-2:])
    factor = damped_cholesky(flat(unit), damping)
    lower = partial(lax.linalg.triangular_solve, left_side=True, lower=True)
    found = lower(factor, lower(factor, flat(right / scale)), transpose_a=True)
    return found.reshape(right.shape) / scale


def of_size_one(
    gram: Float[Array, "*g n n"],
) -> tuple[Float[Array, "*g n n"], Float[Array, "*g n 1"]]:
    """The products of the inputs over their sizes, and the sizes; 1 where one is zero."""
    size = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    size = jnp.where(size > 0, size, 1.0)
    unit = gram / size / jnp.swapaxes(size, -1, -2)
    own = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=bool), gram.shape)
    return jnp.where(own, 1.0, unit), size
