"""AdaRound as published, on rows of inputs and through the activation that follows."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxmet.numerics.rounding.levels import nearest
from jaxmet.numerics.rounding.quadratic import best_weight, bias_correction
from jaxmet.numerics.rounding.soft_rounding import (
    RowData,
    State,
    hard_weight,
    row_error,
)
from jaxmet.transforms.rounding.methods.annealing import Annealing, started
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    Solution,
    Tick,
    per_layer,
    products_of,
)
from jaxmet.tree.checks import check_counts


@dataclasses.dataclass(frozen=True)
class Adam(Annealing):
    r"""AdaRound as published: Adam on rows of inputs, through the activation that follows.

    $$\min\ E\,|f(xW + b) - f(\hat x\tilde W + b)|^2 + \lambda \sum 1 - |2h - 1|^\beta,
    \qquad \tilde W = s\,(\lfloor W/s \rfloor + h)$$

    with $h = \mathrm{clip}(1.2\,\sigma(\alpha) - 0.1,\ 0,\ 1)$: $f$ is the activation that
    alone reads the layer, $x$ its inputs in the float model and $\hat x$ those in the rounded
    one. The annealed $\beta$ drives each choice $h$ to 0 or 1. The loss is in units in which
    the regulariser of all weights counts four times what nearest rounding costs. Weights stay
    within one step of where they were, on the scales of the quantizers. Rows are kept: at
    most 16,384 for each layer by default (`rows` of `jm.adaround`).

    Nagel et al., [Up or Down? Adaptive Rounding for Post-Training
    Quantization](https://arxiv.org/abs/2004.10568), ICML 2020.

    Args:
        iterations: the steps of Adam for each layer; default 2000.
        learning_rate: of Adam; default 0.01.
        regularisation: the weight $\lambda$ of $R$; default 0.01.
        beta_range: where the exponent $\beta$ begins and where it ends; default (20, 2).
        warm_start: the share of the steps before $R$ counts; default 0.2.
        batch: how many rows are drawn in each step; default 256.

    Raises:
        ValueError: for an option that is not a number in its range.

    >>> jm.adaround(params, graph, quantizers, batches, method=jm.Adam(iterations=10_000))
    """

    batch: int = 256
    keeps_rows: ClassVar[bool] = True
    rows: ClassVar[int | None] = 2**14

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("Adam", batch=self.batch)

    def solve(
        self, problem: Problem, kind: Kind, key: jax.Array, tick: Tick
    ) -> Solution:
        """Layers of one kind and shape side by side."""
        state, keys = started(problem, key)
        data, unit = _data(problem, keys, kind=kind, method=self)
        state, curve = self.optimised(
            state, problem, kind, data, unit, tick, self.batch
        )
        return _finished(problem, data, state, kind=kind)._replace(curve=curve)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
@per_layer
def _data(
    problem: Problem, key: jax.Array, *, kind: Kind, method: Annealing
) -> tuple[RowData, jax.Array]:
    """Rows, with the mean of the inputs taken out where the bias makes good for it.

    They are shuffled, so that a step may take neighbours: rows of one image are much alike.
    """
    assert problem.rows is not None
    order = jax.random.permutation(key, problem.rows[0].shape[1])
    inputs, floats = (jnp.take(v, order, axis=1) for v in problem.rows)
    weight, bias, lower, upper = problem.weight, problem.bias, *problem.bounds
    target = jnp.matmul(floats, weight, precision="highest") + bias[:, None]
    if kind.centred:
        own = problem.inputs.float_mean[:, None]
        inputs = inputs - problem.inputs.mean[:, None]
        bias = bias + jnp.matmul(own, weight, precision="highest")[:, 0]
    data = RowData(inputs, target, bias, lower=lower, upper=upper)
    plain = nearest(weight, problem.grid)
    level = jnp.sum(row_error(plain, data, kind.activation))
    unit = method.unit(level, weight.size)
    return data._replace(unit=unit), unit


@functools.partial(jax.jit, static_argnames=("kind",))
@per_layer
def _finished(problem: Problem, data: RowData, state: State, *, kind: Kind) -> Solution:
    """The hard weights, and losses in terms of the rows."""
    rounded = hard_weight(problem.weight, problem.grid, state.alpha)
    plain = nearest(problem.weight, problem.grid)
    best = best_weight(problem.weight, products_of(problem, kind), problem.damping)
    after, before, inherited = (
        row_error(w, data._replace(unit=None), kind.activation, by_output=True)
        for w in (rounded, plain, best)
    )
    gained = after < before
    rounded = jnp.where(gained[:, None], rounded, plain)
    shift = jnp.zeros_like(after)
    if kind.centred:
        means = problem.inputs.mean, problem.inputs.float_mean
        shift = bias_correction(problem.weight, rounded, *means)
    loss = jnp.where(gained, after, before)
    return Solution(rounded, problem.grid, shift, loss, before, inherited)
