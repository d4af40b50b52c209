r"""A matrix as a product of two thin ones, which serves given inputs best.

For inputs $x$ with $G = E\,x^T x$ the error of a matrix $\hat M$ of rank $r$ in the place
of $M$ is

$$E\,|x (M - \hat M)|^2 = |G^{1/2} (M - \hat M)|^2,$$

so the best one cuts the singular value decomposition $G^{1/2} M = U S V^T$ off:
$\hat M = G^{-1/2} U_r S_r V_r^T = M V_r V_r^T$. In the last form nothing is inverted, and
at full rank it is $M$ whatever the inputs were.

Eckart and Young, The Approximation of One Matrix by Another of Lower Rank, 1936; with
inputs, Wang et al., [SVD-LLM](https://arxiv.org/abs/2403.07378), ICLR 2025, section 3.1.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxmet.numerics import xp
from jaxmet.numerics.least_squares import solve
from jaxmet.numerics.xp import Array

DAMPING = 1e-6


class Spectrum(NamedTuple):
    """M V, S and the transpose of V: the first r of each make the best matrix of rank r.

    The error of that matrix is the sum of the squares of all other `values`.
    """

    left: Float[Array, "*g m q"]
    values: Float[Array, "*g q"]
    right: Float[Array, "*g q n"]


def spectrum(
    matrix: Float[Array, "*g m n"],
    gram: Float[Array, "*g m m"] | None = None,
    *,
    damping: float | Float[Array, ""] = DAMPING,
) -> Spectrum:
    r"""The decomposition that holds the best matrices of all ranks.

    In the place of the Gram matrix stands $G + \delta I$, with $\delta$ so much of the mean
    of the diagonal as `damping` says: what the inputs never ask for costs next to nothing,
    yet comes in its own order after all the rest.

    Args:
        matrix: the weight, inputs by outputs, groups in front.
        gram: the Gram matrix of the inputs, m by m; default None: the identity.
        damping: what share of the mean of its diagonal is added to it; default 1e-6.

    Returns:
        A decomposition of which the first r parts are the best matrix of rank r.
    """
    with jax.default_matmul_precision("highest"):
        core, across = matrix, None
        if matrix.shape[-2] < matrix.shape[-1]:
            # All of V then lies in the rows of M, also where the weighting would lose it.
            across, upper = xp.qr(_transposed(matrix))
            core = _transposed(upper)
        weighted = core if gram is None else _root(gram, damping) @ core
        _, values, right = xp.svd(weighted)
        left = core @ _transposed(right)
        right = right if across is None else right @ _transposed(across)
    return Spectrum(left, values, right)


def low_rank(
    matrix: Float[Array, "*g m n"],
    rank: int,
    gram: Float[Array, "*g m m"] | None = None,
    *,
    damping: float | Float[Array, ""] = DAMPING,
) -> tuple[Float[Array, "*g m {rank}"], Float[Array, "*g {rank} n"]]:
    r"""Two factors L and R of the matrix of this rank that minimises $E\,|x (M - L R)|^2$.

    $L = M V_r / c$ and $R = c V_r^T$ with $c_k = \sqrt{|M v_k|}$: each column of L has the
    norm of its row of R. Without inputs they are $U_r \sqrt{S_r}$ and $\sqrt{S_r} V_r^T$.

    Args:
        matrix: the weight, inputs by outputs, groups in front.
        rank: the rank of the result.
        gram: the Gram matrix of the inputs, m by m; default None: the identity.
        damping: what share of the mean of its diagonal is added to it; default 1e-6.

    Returns:
        The two factors, m by rank and rank by n.
    """
    parts = spectrum(matrix, gram, damping=damping)
    left, right = parts.left[..., :rank], parts.right[..., :rank, :]
    # equal norms on both sides: neither factor is much larger than the other
    size = xp.sqrt(xp.sum(xp.square(left), axis=-2, keepdims=True))
    share = xp.sqrt(size)
    left = left / xp.where(share > 0, share, xp.ones_like(share))
    return left, right * _transposed(share)


def masked(parts: Spectrum, rank: int | Int[Array, ""]) -> Float[Array, "*g m n"]:
    """The product of the factors of `low_rank`, for a rank that need not be known before.

    Args:
        parts: the factors of `low_rank`, in the order of their importance.
        rank: how many columns of the first factor count; it may be traced.

    Returns:
        The product, a float array (*g, m, n).
    """
    left = parts.left
    # zeros instead of a slice: the rank may be traced, and shapes may not depend on it
    used = np.arange(left.shape[-1]) < rank
    used = used.reshape((1,) * (left.ndim - 1) + used.shape)
    kept = xp.where(used, left, xp.zeros_like(left))
    return xp.matmul(kept, parts.right, precision="highest")


def refit(
    gram: Float[Array, "*g k k"],
    target: Float[Array, "*g k n"],
    basis: Float[Array, "*g k q"],
    start: Float[Array, "*g q n"],
    *,
    damping: float | Float[Array, ""] = DAMPING,
) -> Float[Array, "*g q n"]:
    r"""The second factor that is best beside a given first one.

    $H$ minimises $\mathrm{tr}\,(W - B H)^T G\,(W - B H)$ and stays near `start` where the
    inputs do not say: with $A = B^T G B$ and $D$ its diagonal,
    $H = H_0 + (A + \lambda D)^{-1} B^T G\,(W - B H_0)$. An output that rounding errors
    leave with a larger error than before keeps its start.

    Args:
        gram: the Gram matrix of the inputs, k by k.
        target: the weight that the product should act as.
        basis: the first factor.
        start: the second factor until now.
        damping: how strongly `start` is kept where the inputs say little; default
            1e-6.

    Returns:
        The new second factor.
    """
    product = partial(xp.matmul, precision="highest")
    pull = product(gram, basis)
    right = product(_transposed(pull), target - product(basis, start))
    found = start + solve(product(_transposed(basis), pull), right, damping)

    def error(h: Array) -> Array:
        left = target - product(basis, h)
        return xp.sum(left * product(gram, left), axis=-2, keepdims=True)

    return xp.where(error(found) < error(start), found, start)


def largest_rank(
    ratio: float | int,
    cost_of_rank_one: float | int,
    cost: float | int,
    most: int,
    multiple: int = 1,
) -> int:
    """The largest rank whose factors cost at most this ratio of the whole, 1 at least.

    It is rounded up to a multiple where the factors then still cost less than the whole and
    the rank is one that there is; else down to a multiple; below the first multiple it
    stays unchanged. AIMET rounds up always.

    Args:
        ratio: the cost of the factors over that of the whole, above 0.
        cost_of_rank_one: the cost of factors of rank one, in any unit (parameters, MACs).
        cost: the cost of the whole, in the same unit.
        most: the largest rank that there is.
        multiple: what the rank should be a multiple of; default 1.

    Returns:
        The rank, from 1 to `most`.
    """
    exact = ratio * cost / cost_of_rank_one
    rank = min(max(math.floor(exact * (1 + 1e-12)), 1), most)  # 0.29 * 100 is not 29
    above = multiple_above(rank, cost_of_rank_one, cost, most, multiple)
    return above or rank // multiple * multiple or rank


def multiple_above(
    rank: int,
    cost_of_rank_one: float | int,
    cost: float | int,
    most: int,
    multiple: int,
) -> int | None:
    """A rank up to a multiple, None where there is none or it saves nothing.

    Args:
        rank: the rank that is rounded up, at least 1.
        cost_of_rank_one: the cost of factors of rank one, in any unit (parameters, MACs).
        cost: the cost of the whole, in the same unit.
        most: the largest rank that there is.
        multiple: what the rank should be a multiple of.

    Returns:
        The multiple, or None.
    """
    above = -(-rank // multiple) * multiple
    return above if above <= most and above * cost_of_rank_one < cost else None


def _root(gram: Array, damping: float | Array) -> Array:
    r"""An R with $R^T R = G + \delta I$; a Gram matrix of zeros stands for one of size 1."""
    size = xp.mean(xp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    size = xp.where(size > 0, size, xp.ones_like(size))
    values, vectors = xp.eigh(gram / size)
    values = xp.maximum(values, 0.0) + damping  # rounding errors make some negative
    return xp.sqrt(size) * xp.sqrt(values)[..., None] * _transposed(vectors)


def _transposed(v: Array) -> Array:
    return xp.swapaxes(v, -1, -2)
