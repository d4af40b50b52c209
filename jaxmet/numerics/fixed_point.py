"""Fixed points of maps that never take two points apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MEMORY = 10
GROWTH = 2.0  # a residual that grows by more than this clears the memory
AVERAGED = 0.7  # and then this fraction of a plain step is taken


class FixedPoint(NamedTuple):
    """The point, what the map returned with it, and how often the map was evaluated."""

    x: Float[Array, " n"]
    about: Any
    steps: Int[Array, ""]


class _State(NamedTuple):
    candidate: jax.Array
    x: jax.Array
    residual: jax.Array
    about: Any
    xs: jax.Array  # (memory, n)
    residuals: jax.Array  # (memory, n)
    filled: jax.Array  # (memory,)
    steps: jax.Array


def anderson(
    step: Callable[[jax.Array], tuple[jax.Array, Any]],
    start: Float[Array, " n"],
    *,
    tolerance: Float[Array, ""] | float,
    max_steps: Int[Array, ""] | int,
) -> FixedPoint:
    r"""A point with $\max_i |T(x)_i - x_i|$ below `tolerance`; `step` gives (T(x), about).

    With residuals $f_k = T(x_k) - x_k$ the next point is $x + f - (\Delta X + \Delta F)
    \gamma$, where $\gamma$ minimises $\|f - \Delta F \gamma\|$ over the last steps. Should
    that make the residual grow much, the memory is cleared and an averaged step
    $x + 0.7 f$ is taken from the point before, as often as needed: those alone converge if
    T is nonexpansive.

    Walker and Ni, [Anderson Acceleration for Fixed-Point
    Iterations](https://doi.org/10.1137/10078356X), SIAM J. Numer. Anal. 2011.

    Args:
        step: the map T; it returns the next point and anything about it.
        start: the first point.
        tolerance: the largest change of an entry at the end.
        max_steps: how many steps at most.

    Returns:
        The point, what `step` returned with it, and how often `step` was called.
    """

    def body(s: _State) -> _State:
        image, about = step(s.candidate)
        f = image - s.candidate
        size, before = jnp.max(jnp.abs(f)), jnp.max(jnp.abs(s.residual))
        worse = (size > GROWTH * before) & jnp.any(s.filled)
        back = s._replace(
            candidate=s.x + AVERAGED * s.residual,
            filled=jnp.zeros_like(s.filled),
            steps=s.steps + 1,
        )
        at = s.steps % MEMORY
        on = _State(
            s.candidate,
            s.candidate,
            f,
            about,
            s.xs.at[at].set(s.x),
            s.residuals.at[at].set(s.residual),
            s.filled.at[at].set(s.steps > 0),
            s.steps + 1,
        )
        on = on._replace(candidate=s.candidate + f - _correction(on))
        return jax.tree.map(lambda a, b: jnp.where(worse, a, b), back, on)

    def unfinished(s: _State) -> jax.Array:
        return (jnp.max(jnp.abs(s.residual)) >= tolerance) & (s.steps < max_steps)

    about = jax.eval_shape(lambda x: step(x)[1], start)
    about = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), about)
    empty = jnp.zeros((MEMORY, *start.shape), start.dtype)
    unknown = jnp.full_like(start, jnp.inf)
    filled = jnp.zeros(MEMORY, bool)
    state = _State(start, start, unknown, about, empty, empty, filled, jnp.int32(0))
    state = jax.lax.while_loop(unfinished, body, state)
    return FixedPoint(state.x, state.about, state.steps)


def _correction(s: _State) -> jax.Array:
    """(ΔX + ΔF) γ, with a little Tikhonov regularisation."""
    known = s.filled[:, None]
    df = jnp.where(known, s.residual[None] - s.residuals, 0.0)  # (memory, n)
    dx = jnp.where(known, s.x[None] - s.xs, 0.0)
    gram = jnp.matmul(df, df.T, precision="highest")
    size = jnp.trace(gram) / MEMORY
    ridge = jnp.where(size > 0, 1e-6 * size, 1.0)
    gram = gram + ridge * jnp.eye(MEMORY, dtype=gram.dtype)
    right = jnp.matmul(df, s.residual, precision="highest")
    gamma = jax.scipy.linalg.solve(gram, right, assume_a="pos")
    return jnp.matmul(gamma, dx + df, precision="highest")
