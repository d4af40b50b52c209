"""What AdaRound's two forms share: a smooth choice between down and up, pressed to decide."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.rounding.soft_rounding import (
    Schedule,
    State,
    adaround,
    start_adaround,
)
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    RoundingMethod,
    Tick,
    per_layer,
)
from jaxmet.tree.checks import check_counts, check_numbers

CHUNKS = 20  # of an optimisation, between which the progress bar moves


@dataclasses.dataclass(frozen=True)
class Annealing(RoundingMethod):
    """The options of the optimisation; see `Gram` and `Adam`."""

    iterations: int = 2000
    learning_rate: float = 1e-2
    regularisation: float = 0.01
    beta_range: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2

    def __post_init__(self) -> None:
        caller = type(self).__name__
        check_counts(caller, least=0, iterations=self.iterations)
        check_numbers(caller, learning_rate=(self.learning_rate, 0))
        check_numbers(caller, regularisation=(self.regularisation, 0))
        check_numbers(caller, warm_start=(self.warm_start, 0))
        pair = self.beta_range
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"jaxmet.{caller}: beta_range is {pair!r}. Give where β begins and where "
                "it ends, such as (20.0, 2.0)."
            )
        for end in pair:
            check_numbers(caller, beta_range=(end, 0))
        object.__setattr__(self, "beta_range", (float(pair[0]), float(pair[1])))

    def unit(self, level: jax.Array, weights: int) -> jax.Array:
        """The unit of the loss: nearest rounding costs a quarter of the whole regulariser.

        The layer's own size must not decide whether weights come to a decision.
        """
        worth = 0.25 * self.regularisation * weights
        return (
            jnp.where(level > 0, level / worth, 1.0) if worth else jnp.ones_like(level)
        )

    def optimised(
        self,
        state: State,
        problem: Problem,
        kind: Kind,
        data: Any,
        unit: jax.Array,
        tick: Tick,
        batch: int = 1,
    ) -> tuple[State, np.ndarray | None]:
        """The state after all steps, and the loss after each chunk of them."""
        size = max(1, -(-self.iterations // CHUNKS))
        curve = []
        for first in range(0, self.iterations, size):
            steps = min(size, self.iterations - first)
            given = state, problem, data, unit
            state, error = _stepped(
                *given, kind=kind, method=self, steps=steps, batch=batch
            )
            curve.append(error)
            tick(steps / self.iterations, error)
        return state, np.stack(curve, axis=1) if curve else None


@jax.jit
def started(problem: Problem, key: jax.Array) -> tuple[State, jax.Array]:
    """The states before the first step, and one more key for each layer."""
    number = problem.weight.shape[0]
    keys, others = jax.random.split(key, (2, number))
    return jax.vmap(start_adaround)(problem.weight, problem.grid, keys), others


@functools.partial(jax.jit, static_argnames=("kind", "method", "steps", "batch"))
@per_layer
def _stepped(
    state: State,
    problem: Problem,
    data: Any,
    unit: jax.Array,
    *,
    kind: Kind,
    method: Annealing,
    steps: int,
    batch: int,
) -> tuple[State, jax.Array]:
    schedule = Schedule(
        method.iterations, method.warm_start, *method.beta_range, method.regularisation
    )
    state, trace = adaround(
        state,
        problem.weight,
        problem.grid,
        data,
        schedule,
        steps=steps,
        learning_rate=method.learning_rate,
        batch=batch,
        activation=kind.activation,
    )
    return state, jnp.sum(trace.error[-1]) * unit
