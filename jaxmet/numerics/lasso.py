r"""Few coefficients that do the work of many: least squares with a penalty on their sizes.

$$\min_\beta\ \tfrac12 \beta^T A \beta - b^T \beta + \lambda |\beta|_1$$

Tibshirani, Regression Shrinkage and Selection via the Lasso, 1996; by coordinates, Friedman
et al., Regularization Paths for Generalized Linear Models via Coordinate Descent, 2010.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SPAN = 1e-7  # of the penalty that leaves nothing: the least that is tried
HALVINGS = 40


def lasso(
    gram: Float[Array, "n n"],
    cross: Float[Array, " n"],
    penalty: float | Float[Array, ""],
    start: Float[Array, " n"],
    *,
    sweeps: int = 500,
    tolerance: float = 1e-6,
) -> Float[Array, " n"]:
    r"""The minimum, one coefficient after the other at its best beside the rest.

    $\beta_i \leftarrow S(b_i - \sum_{j \ne i} A_{ij}\beta_j) / A_{ii}$, where S takes
    $\lambda$ from the magnitude. It ends when no coefficient moves what it contributes by
    more than `tolerance` of the largest contribution, or after so many sweeps.

    Args:
        gram: the quadratic form A.
        cross: the linear form b.
        penalty: λ, the price of magnitude.
        start: the first guess.
        sweeps: how many sweeps at most; default 500.
        tolerance: when to stop, as a share of the largest contribution; default 1e-6.

    Returns:
        The coefficients.
    """
    diagonal = jnp.diagonal(gram)
    own = jnp.where(diagonal > 0, diagonal, 1.0)

    def one(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple:
        beta, slope = state
        pull = slope[i] + own[i] * beta[i]
        new = jnp.sign(pull) * jnp.maximum(jnp.abs(pull) - penalty, 0.0) / own[i]
        return beta.at[i].set(new), slope - gram[i] * (new - beta[i])

    def sweep(state: tuple) -> tuple:
        beta, _, turns = state
        slope = cross - jnp.matmul(gram, beta, precision="highest")
        new, _ = lax.fori_loop(0, beta.size, one, (beta, slope))
        largest = jnp.max(jnp.abs(new) * jnp.sqrt(own))
        moved = jnp.max(jnp.abs(new - beta) * jnp.sqrt(own))
        return new, moved > tolerance * largest, turns + 1

    def unfinished(state: tuple) -> jax.Array:
        return state[1] & (state[2] < sweeps)

    return lax.while_loop(unfinished, sweep, (start, jnp.asarray(True), 0))[0]


@jax.jit
def sparse(
    gram: Float[Array, "n n"], cross: Float[Array, " n"], keep: int | Int[Array, ""]
) -> Float[Array, " n"]:
    """The minimum under a penalty that leaves `keep` coefficients, or the next fewer.

    The penalty is halved in, on a logarithmic scale, from the one that leaves none.

    Args:
        gram: the quadratic form A.
        cross: the linear form b.
        keep: how many coefficients may differ from zero.

    Returns:
        The coefficients.
    """

    def unfinished(state: tuple) -> jax.Array:
        _, _, beta, turns = state
        return (turns < HALVINGS) & (jnp.sum(beta != 0) != keep)

    def halve(state: tuple) -> tuple:
        low, high, beta, turns = state
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        new = lasso(gram, cross, middle, beta)
        few = jnp.sum(new != 0) <= keep
        low, high = jnp.where(few, low, middle), jnp.where(few, middle, high)
        return low, high, jnp.where(few, new, beta), turns + 1

    high = jnp.max(jnp.abs(cross))
    state = (SPAN * high, high, jnp.zeros_like(cross), 0)
    return lax.while_loop(unfinished, halve, state)[2]
