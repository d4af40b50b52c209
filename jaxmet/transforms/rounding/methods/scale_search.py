"""Sequential MSE: scales by the outputs that nearest rounding on them gives."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxmet.engine.program import compat
from jaxmet.numerics.rounding.levels import LevelGrid, nearest
from jaxmet.numerics.rounding.search import search_scales
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

CANDIDATES = 20


@dataclasses.dataclass(frozen=True)
class Search(RoundingMethod):
    """Nearest rounding on the best of `candidates` scales: what `jm.search_scales` runs."""

    candidates: int = CANDIDATES
    searches_pinned: ClassVar[bool] = True
    pads: ClassVar[bool] = True

    def solve(
        self, problem: Problem, kind: Kind, key: jax.Array, tick: Tick
    ) -> Solution:
        """Layers of one kind and shape side by side."""
        del key
        form = quadratic_form(problem, kind=kind)
        found = _rounded(problem, *form, kind=kind, candidates=self.candidates)
        tick(1.0, found.loss)
        return found


@functools.partial(
    jax.jit, static_argnames=("kind", "candidates"), compiler_options=compat.QUICK
)
@per_layer
def _rounded(
    problem: Problem,
    target: jax.Array,
    gram: jax.Array,
    *,
    kind: Kind,
    candidates: int,
) -> Solution:
    grid = problem.grid
    if kind.free and kind.shared is not None:
        grid = searched(problem, kind, target, gram, candidates)
    plain = nearest(problem.weight, grid)
    return at_least_nearest(problem, kind, target, plain, grid)


def searched(
    problem: Problem, kind: Kind, target: jax.Array, gram: jax.Array, candidates: int
) -> LevelGrid:
    """The best grid of a layer whose scales are free, in the shape of the one it has."""
    assert kind.shared is not None
    grid = search_scales(
        target,
        problem.grid.low,
        problem.grid.high,
        gram,
        symmetric=kind.symmetric,
        blocks=kind.blocks,
        candidates=candidates,
        shared=kind.shared,
    ).grid
    shape = problem.grid.scale.shape
    return grid._replace(
        scale=jnp.broadcast_to(grid.scale, shape),
        zero_point=jnp.broadcast_to(grid.zero_point, shape),
    )
