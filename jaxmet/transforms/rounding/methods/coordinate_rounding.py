"""Descent over the integers: each weight in turn takes the best one beside the others."""

import dataclasses
import functools
from typing import ClassVar, Literal, get_args

import jax

from jaxmet.engine.program import compat
from jaxmet.numerics.rounding.coordinate import coordinate_descent
from jaxmet.transforms.rounding.methods.scale_search import CANDIDATES, searched
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    RoundingMethod,
    Solution,
    Tick,
    at_least_nearest,
    per_layer,
    quadratic_form,
)
from jaxmet.tree.checks import check_choices, check_counts

Scales = Literal["refit", "search", "given"]
Start = Literal["gptq", "nearest"]


@dataclasses.dataclass(frozen=True)
class Coordinate(RoundingMethod):
    r"""Coordinate descent over the integers: the default method of `jm.adaround`.

    $$\min_{\hat W}\ \mathrm{tr}\,(\hat W - W^*)^T G\, (\hat W - W^*)$$

    with the Gram matrix $G$ of the layer's inputs and the best real weights $W^*$. Scales are
    searched, the integers start from GPTQ's rounding, and then each weight in turn takes the
    integer that is best beside all others, until none moves. The loss is exact over all rows.

    Zhang et al., [COMQ](https://arxiv.org/abs/2403.07134), 2024.

    Args:
        sweeps: how often all weights of a layer are visited at most; default 20.
        start: the integers before the first sweep: 'gptq' (the default) or 'nearest'.
        scales: 'refit' (the default) searches scales as `jm.search_scales` does, and fits
            them to the integers in each sweep; 'search' only searches; 'given' keeps those of
            the quantizers. Scales that are numbers already are always kept.

    Raises:
        ValueError: for a negative or fractional number of sweeps, and unknown words.

    >>> jm.adaround(params, graph, quantizers, batches, method=jm.Coordinate(sweeps=5))
    """

    sweeps: int = 20
    start: Start = "gptq"
    scales: Scales = "refit"
    pads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts("Coordinate", least=0, sweeps=self.sweeps)
        check_choices("Coordinate", start=(self.start, get_args(Start)))
        check_choices("Coordinate", scales=(self.scales, get_args(Scales)))

    def solve(
        self, problem: Problem, kind: Kind, key: jax.Array, tick: Tick
    ) -> Solution:
        """Layers of one kind and shape side by side."""
        del key
        found = descended(problem, kind=kind, method=self)
        tick(1.0, found.loss)
        return found


def descended(problem: Problem, *, kind: Kind, method: Coordinate) -> Solution:
    """Layers side by side."""
    form = quadratic_form(problem, kind=kind)
    return _descended(problem, *form, kind=kind, method=method)


@functools.partial(
    jax.jit, static_argnames=("kind", "method"), compiler_options=compat.QUICK
)
@per_layer
def _descended(
    problem: Problem,
    target: jax.Array,
    gram: jax.Array,
    *,
    kind: Kind,
    method: Coordinate,
) -> Solution:
    """Scales, the start, and the sweeps, of one layer."""
    free = kind.free and kind.shared is not None and method.scales != "given"
    grid = problem.grid
    if free:
        grid = searched(problem, kind, target, gram, CANDIDATES)
    found = coordinate_descent(
        problem.weight,
        grid,
        gram,
        target,
        sweeps=method.sweeps,
        start=method.start,
        damping=0.0,  # the Gram matrix has it already
        refit=free and method.scales == "refit",
        shared=kind.shared or (),
    )
    return at_least_nearest(problem, kind, target, found.weight, found.grid)
