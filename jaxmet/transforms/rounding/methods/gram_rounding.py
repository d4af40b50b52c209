"""AdaRound on the Gram matrix of the inputs: all rows count, and none is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxmet.numerics.rounding.levels import nearest
from jaxmet.numerics.rounding.soft_rounding import GramData, State, hard_weight
from jaxmet.transforms.rounding.methods.annealing import Annealing, started
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    Solution,
    Tick,
    at_least_nearest,
    per_layer,
    quadratic_form,
)


@dataclasses.dataclass(frozen=True)
class Gram(Annealing):
    r"""AdaRound's smooth choice on the Gram matrix of the inputs, over all rows at once.

    Adam minimises

    $$\mathrm{tr}\,(\tilde W - W^*)^T G\, (\tilde W - W^*) + \lambda R$$

    where $\tilde W$ lies between the grid points below and above the weight, and the annealed
    $R = \sum 1 - |2h - 1|^\beta$ drives each choice $h$ to 0 or 1. $G$ is the Gram matrix of
    the layer's inputs, and $W^*$ the best real weights. The loss is in units in which the
    regulariser of all weights counts four times what nearest rounding costs. Weights stay
    within one step of where they were, on the scales of the quantizers.

    Nagel et al., [Up or Down? Adaptive Rounding for Post-Training
    Quantization](https://arxiv.org/abs/2004.10568), ICML 2020.

    Args:
        iterations: the steps of Adam for each layer; default 2000.
        learning_rate: of Adam; default 0.01.
        regularisation: the weight $\lambda$ of $R$; default 0.01.
        beta_range: where the exponent $\beta$ begins and where it ends; default (20, 2).
        warm_start: the share of the steps before $R$ counts; default 0.2.

    Raises:
        ValueError: for an option that is not a number in its range.

    >>> jm.adaround(params, graph, quantizers, batches, method=jm.Gram(iterations=500))
    """

    def solve(
        self, problem: Problem, kind: Kind, key: jax.Array, tick: Tick
    ) -> Solution:
        """Layers of one kind and shape side by side."""
        state, _ = started(problem, key)
        form = quadratic_form(problem, kind=kind)
        data, unit = _data(problem, *form, method=self)
        state, curve = self.optimised(state, problem, kind, data, unit, tick)
        return _finished(problem, data, state, kind=kind)._replace(curve=curve)


@functools.partial(jax.jit, static_argnames=("method",))
@per_layer
def _data(
    problem: Problem, target: jax.Array, gram: jax.Array, *, method: Annealing
) -> tuple[GramData, jax.Array]:
    plain = nearest(problem.weight, problem.grid) - target
    level = jnp.sum(plain * jnp.matmul(gram, plain, precision="highest"))
    unit = method.unit(level, problem.weight.size)
    return GramData(gram / unit, target), unit


@functools.partial(jax.jit, static_argnames=("kind",))
@per_layer
def _finished(
    problem: Problem, data: GramData, state: State, *, kind: Kind
) -> Solution:
    rounded = hard_weight(problem.weight, problem.grid, state.alpha)
    return at_least_nearest(problem, kind, data.target, rounded, problem.grid)
