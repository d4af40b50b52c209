r"""Least squares from products of inputs, which may say little or nothing."""

import math
from functools import partial
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Float

from jaxmet.numerics import xp
from jaxmet.numerics.rounding.quadratic import damped_cholesky
from jaxmet.numerics.xp import Array


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
    found = _solved(flat(unit), flat(right / scale), damping)
    return found.reshape(right.shape) / scale


def _solved(unit: Any, right: Any, damping: Any) -> Any:
    if xp.is_jax(unit, right, damping):
        factor = damped_cholesky(unit, damping)
        lower = partial(lax.linalg.triangular_solve, left_side=True, lower=True)
        return lower(factor, lower(factor, right), transpose_a=True)
    found = np.full_like(right, np.nan)
    for one, into, sides in zip(unit, found, right, strict=True):
        # LAPACK does not tell of values that are not finite.
        if np.isfinite(one).all() and np.isfinite(sides).all():
            into[:] = _solved_on_host(one, sides, float(damping))
    return found


def _solved_on_host(unit: np.ndarray, right: np.ndarray, damping: float) -> np.ndarray:
    """By the factor of `damped_cholesky`."""
    from scipy import linalg  # only where it is needed: it takes long to import

    lacking = max(damping, len(unit) * float(np.finfo(unit.dtype).eps))
    while lacking < 1e7:
        try:
            damped = unit + lacking * np.eye(len(unit), dtype=unit.dtype)
            factor = linalg.cho_factor(damped, lower=True, check_finite=False)
        except linalg.LinAlgError:
            lacking *= 10
        else:
            return linalg.cho_solve(factor, right, check_finite=False)
    return np.full_like(right, np.nan)


def of_size_one(
    gram: Float[Array, "*g n n"],
) -> tuple[Float[Array, "*g n n"], Float[Array, "*g n 1"]]:
    """The products of the inputs over their sizes, and the sizes; 1 where one is zero.

    Args:
        gram: the Gram matrices of inputs, a float array (*g, n, n).

    Returns:
        The scaled matrices, (*g, n, n), with ones on the diagonal, and the sizes, (*g, n, 1).
    """
    size = xp.sqrt(xp.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    size = xp.where(size > 0, size, xp.ones_like(size))
    unit = gram / size / xp.swapaxes(size, -1, -2)
    own = np.broadcast_to(np.eye(gram.shape[-1], dtype=bool), gram.shape)
    return xp.where(own, xp.ones_like(unit), unit), size
