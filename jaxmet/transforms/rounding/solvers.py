"""One layer's weights on the grid of its quantizer, from statistics of its inputs.

What every method gets (`Problem`, `Kind`), what it returns (`Solution`), and what several share.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxmet.engine.program import compat
from jaxmet.numerics.rounding.levels import LevelGrid, nearest
from jaxmet.numerics.rounding.quadratic import (
    Products,
    best_weight,
    bias_correction,
    centred,
    damped,
    output_error,
)
from jaxmet.transforms.rounding.input_statistics import Inputs

Tick = Callable[
    [float, Any], None
]  # moves the progress bar by a share, and shows a loss


class Kind(NamedTuple):
    """What is static about a layer: layers of one kind are solved by one program.

    `blocks` scales lie along the inputs, and one scale lies along all `shared` axes of the
    grid (None: scales are shared in a way that these axes do not state). With `centred` the
    bias takes what is constant of the error. `free` says whether the scales may change,
    `activation` what alone reads the outputs.
    """

    symmetric: bool
    blocks: int
    shared: tuple[int, ...] | None
    centred: bool
    free: bool = True
    activation: Callable[[jax.Array], jax.Array] | None = None


class Problem(NamedTuple):
    """A layer's weight, its grid and statistics of its inputs.

    `damping` is the share of the mean of its diagonal that is added to the Gram matrix's
    diagonal. Rows and the bounds of what follows come with methods that keep rows.
    """

    weight: Any
    grid: LevelGrid
    inputs: Inputs
    bias: Any
    damping: Any
    rows: tuple[jax.Array, jax.Array] | None = None
    bounds: tuple[jax.Array | None, jax.Array | None] = (None, None)


class Solution(NamedTuple):
    """Weights on a grid, what the bias gains, and the losses by output: (groups, outs).

    `inherited` is the loss of the best real weights, which no rounding can take away;
    `curve` holds the loss of the optimisation after each chunk of steps.
    """

    weight: Any
    grid: LevelGrid
    shift: Any
    loss: Any
    nearest_loss: Any
    inherited: Any
    curve: Any = None


class RoundingMethod(abc.ABC):
    """How the weights of a layer are chosen: a frozen dataclass of options with `solve`.

    A new method is one file of `methods/`, with an entry in the table of that folder.
    `keeps_rows` asks for the rows of inputs besides their Gram matrices, `rows` is how many
    of them are used by default (None: as many as `most_rows` says), `searches_pinned` says
    that scales which are numbers already are searched too. With `pads` layers are filled with
    zeros up to a few sizes: for methods that look at the weight and the Gram matrices alone.
    """

    keeps_rows: ClassVar[bool] = False
    rows: ClassVar[int | None] = None
    searches_pinned: ClassVar[bool] = False
    pads: ClassVar[bool] = False

    @abc.abstractmethod
    def solve(
        self, problem: Problem, kind: Kind, key: jax.Array, tick: Tick
    ) -> Solution:
        """Layers of one kind and shape side by side: every array has a leading axis for them.

        Calls `tick` with shares of the work that add up to one.
        """


def per_layer(function: Callable) -> Callable:
    """A function of one layer for all layers side by side; a single one is not batched."""

    @functools.wraps(function)
    def over(*args: Any, **static: Any) -> Any:
        one = functools.partial(function, **static)
        leaves = jax.tree.leaves(args)
        if leaves[0].shape[0] == 1:
            found = one(*jax.tree.map(lambda v: v[0], args))
            return jax.tree.map(lambda v: v[None], found)
        return jax.vmap(one)(*args)

    return over


def products_of(problem: Problem, kind: Kind) -> Products:
    """The products that count: the bias takes what is constant, where there is one."""
    products, inputs = problem.inputs.products, problem.inputs
    if not kind.centred:
        return products
    return centred(products, inputs.mean, inputs.float_mean)


@functools.partial(jax.jit, static_argnames=("kind",), compiler_options=compat.QUICK)
@per_layer
def quadratic_form(problem: Problem, *, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """The best real weights, and the damped Gram matrix that prices what differs from them.

    A program of its own: two batched LAPACK calls side by side in one program can wait for
    each other for ever on few CPU cores (jaxlib 0.10).
    """
    products = products_of(problem, kind)
    target = best_weight(problem.weight, products, problem.damping)
    return target, damped(products.gram, problem.damping)


def at_least_nearest(
    problem: Problem, kind: Kind, best: jax.Array, rounded: jax.Array, grid: LevelGrid
) -> Solution:
    """What was found, or nearest rounding where that is no worse, output by output.

    `best` are the real weights that the rounded ones approach.
    """
    products = products_of(problem, kind)
    weight, plain = problem.weight, nearest(problem.weight, problem.grid)
    each = jnp.stack([rounded, plain, best])  # one product in the program for all three
    errors = jax.lax.map(lambda w: output_error(weight, w, products), each)
    after, before, inherited = errors
    if kind.shared == () and kind.blocks == 1:
        gained = after < before
    else:
        gained = jnp.broadcast_to(jnp.sum(after) < jnp.sum(before), after.shape)
    pick = functools.partial(jnp.where, gained[:, None])
    rounded = pick(rounded, plain)
    grid = grid._replace(
        scale=pick(grid.scale, problem.grid.scale),
        zero_point=pick(grid.zero_point, problem.grid.zero_point),
    )
    shift = jnp.zeros_like(after)
    if kind.centred:
        means = problem.inputs.mean, problem.inputs.float_mean
        shift = bias_correction(weight, rounded, *means)
    loss = jnp.where(gained, after, before)
    return Solution(rounded, grid, shift, loss, before, inherited)
