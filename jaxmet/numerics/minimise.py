"""A quasi-Newton method whose loop evaluates the function in one place only.

`optax.lbfgs` knows no bounds, and its line search evaluates the function in a loop of its own: a
large function would be compiled more than once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MEMORY = 10
ARMIJO = 1e-4


class _Descent(NamedTuple):
    x: jax.Array
    value: jax.Array
    gradient: jax.Array
    direction: jax.Array
    length: jax.Array
    moves: jax.Array  # (memory, n): differences of x
    changes: jax.Array  # (memory, n): differences of the gradient
    curvature: jax.Array  # (memory,): their products, zero where there is nothing yet
    evaluations: jax.Array
    idle: jax.Array  # rejected steps in a row


def lbfgs(
    function: Callable[[jax.Array], jax.Array],
    start: Float[Array, " n"],
    lower: Float[Array, " n"],
    upper: Float[Array, " n"],
    *,
    evaluations: Int[Array, ""] | int,
    first_step: float = 0.3,
) -> Float[Array, " n"]:
    """A lower point of a smooth function within bounds, after so many evaluations.

    Limited-memory BFGS with a backtracking line search; steps are cut off at the bounds.
    Every turn of the loop evaluates one point, whether it is taken or not, so that a large
    function is compiled once. `first_step` is the largest entry of the first step.

    Nocedal and Wright, Numerical Optimization, 2006, algorithms 7.4 and 7.5.

    Args:
        function: a smooth function of a vector.
        start: the first point, within the bounds.
        lower: the lower bound of each entry.
        upper: the upper bound.
        evaluations: how often the function is evaluated.
        first_step: the length of the first step, in its largest entry; default 0.3.

    Returns:
        The best point.
    """
    value_and_gradient = jax.value_and_grad(function)

    def body(s: _Descent) -> _Descent:
        x = jnp.clip(s.x + s.length * s.direction, lower, upper)
        value, gradient = value_and_gradient(x)
        slope = jnp.vdot(s.gradient, x - s.x, precision="highest")
        taken = value <= s.value + ARMIJO * slope
        taken &= jnp.all(jnp.isfinite(gradient))
        return jax.tree.map(
            lambda a, b: jnp.where(taken, a, b),
            _forward(s, x, value, gradient, lower, upper, first_step),
            _shorter(s, value, slope, first_step),
        )

    def unfinished(s: _Descent) -> jax.Array:
        return (s.evaluations < evaluations) & (s.idle < 8)

    n, dtype = start.size, start.dtype
    table = jnp.zeros((MEMORY, n), dtype)
    state = _Descent(
        start,
        jnp.full((), jnp.inf, dtype),
        jnp.zeros_like(start),
        jnp.zeros_like(start),
        jnp.ones((), dtype),
        table,
        table,
        jnp.zeros(MEMORY, dtype),
        jnp.int32(0),
        jnp.int32(0),
    )
    return jax.lax.while_loop(unfinished, body, state).x


def _forward(
    s: _Descent,
    x: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    first_step: float,
) -> _Descent:
    """The state at a point that was taken."""
    move, change = x - s.x, gradient - s.gradient
    product = jnp.vdot(move, change, precision="highest")
    # a pair without positive curvature would make the inverse Hessian indefinite
    enough = 1e-7 * jnp.linalg.norm(move) * jnp.linalg.norm(change)
    learnt = (product > enough) & jnp.isfinite(s.value)

    def pushed(table: jax.Array, entry: jax.Array) -> jax.Array:
        new = jnp.concatenate([table[1:], entry[None]])
        return jnp.where(learnt, new, table)

    moves, changes = pushed(s.moves, move), pushed(s.changes, change)
    curvature = pushed(s.curvature, product)
    direction = -_inverse_hessian(gradient, moves, changes, curvature, first_step)
    # a step against an active bound would be cut to nothing and count as no progress
    held = ((x <= lower) & (direction < 0)) | ((x >= upper) & (direction > 0))
    direction = jnp.where(held, 0.0, direction)
    # with bounds held the quasi-Newton direction may point uphill
    downhill = jnp.vdot(direction, gradient, precision="highest") < 0
    direction = jnp.where(downhill, direction, _steepest(gradient, first_step))
    return _Descent(
        x,
        value,
        gradient,
        direction,
        jnp.ones_like(s.length),
        moves,
        changes,
        curvature,
        s.evaluations + 1,
        jnp.int32(0),
    )


def _shorter(
    s: _Descent, value: jax.Array, slope: jax.Array, first_step: float
) -> _Descent:
    """The state after a step that was too long: a parabola says how much."""
    bend = 2 * (value - s.value - slope)
    # the minimum of the parabola through both values and the slope, kept within 0.1 … 0.5
    factor = jnp.where(bend > 0, -slope / jnp.where(bend > 0, bend, 1.0), 0.5)
    factor = jnp.clip(jnp.where(jnp.isfinite(factor), factor, 0.1), 0.1, 0.5)
    again = s.idle == 4  # the memory misleads: start it afresh
    return s._replace(
        direction=jnp.where(again, _steepest(s.gradient, first_step), s.direction),
        length=jnp.where(again, 0.1, s.length * factor),
        curvature=jnp.where(again, 0.0, s.curvature),
        evaluations=s.evaluations + 1,
        idle=s.idle + 1,
    )


def _steepest(gradient: jax.Array, largest: float) -> jax.Array:
    return -gradient * (largest / jnp.maximum(jnp.max(jnp.abs(gradient)), 1e-30))


def _inverse_hessian(
    gradient: jax.Array,
    moves: jax.Array,
    changes: jax.Array,
    curvature: jax.Array,
    first_step: float,
) -> jax.Array:
    """The two-loop recursion, newest entries last; empty entries do nothing."""
    known = curvature > 0
    inverse = jnp.where(known, 1 / jnp.where(known, curvature, 1.0), 0.0)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.vdot(a, b, precision="highest")

    def back(k: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i = MEMORY - 1 - k
        q, alphas = carry
        alpha = inverse[i] * dot(moves[i], q)
        return q - alpha * changes[i], alphas.at[i].set(alpha)

    q, alphas = jax.lax.fori_loop(
        0, MEMORY, back, (gradient, jnp.zeros_like(curvature))
    )
    newest = dot(changes[-1], changes[-1])
    size = jnp.where(known[-1], curvature[-1] / jnp.where(known[-1], newest, 1.0), 0.0)
    cold = first_step / jnp.maximum(jnp.max(jnp.abs(gradient)), 1e-30)
    r = q * jnp.where(known[-1], size, cold)

    def forth(i: Any, r: jax.Array) -> jax.Array:
        beta = inverse[i] * dot(changes[i], r)
        return r + moves[i] * (alphas[i] - beta)

    return jax.lax.fori_loop(0, MEMORY, forth, r)
