"""One layer's weights on their grid, from what is known of its inputs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmet.engine.program import compat
from jaxmet.numerics.rounding.adaround import (
    GramData,
    RowData,
    Schedule,
    State,
    adaround,
    hard_weight,
    row_error,
    start_adaround,
)
from jaxmet.numerics.rounding.coordinate import coordinate_descent
from jaxmet.numerics.rounding.levels import Grid, nearest
from jaxmet.numerics.rounding.quadratic import (
    Products,
    best_weight,
    bias_correction,
    centred,
    damped,
    output_error,
)
from jaxmet.numerics.rounding.search import search_scales
from jaxmet.transforms.rounding.inputs import Inputs

CHUNKS = 20  # of an optimisation, between which the progress bar moves


@dataclasses.dataclass(frozen=True)
class Options:
    """How weights are chosen; `scales` says where those of the grid come from."""

    method: str
    scales: str = "given"
    iterations: int = 1000
    sweeps: int = 20
    start: str = "gptq"
    damping: float = 0.01
    candidates: int = 20
    learning_rate: float = 1e-2
    regularisation: float = 0.01
    beta_range: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    batch: int = 256


class Kind(NamedTuple):
    """What is static about a layer: layers of one kind are solved by one program."""

    symmetric: bool
    blocks: int
    shared: tuple[int, ...] | None
    centred: bool
    free: bool = True  # whether the grid may have other scales
    activation: Callable[[jax.Array], jax.Array] | None = None


class Problem(NamedTuple):
    """A layer, its grid, and what the data tell; rows and bounds where Adam asks for them."""

    weight: jax.Array
    grid: Grid
    inputs: Inputs
    bias: jax.Array
    rows: tuple[jax.Array, jax.Array] | None = None
    bounds: tuple[jax.Array | None, jax.Array | None] = (None, None)


class Solution(NamedTuple):
    """Weights on a grid, what the bias gains, and the losses by output: (groups, outs).

    `inherited` is the loss of the best real weights, which no rounding can take away;
    `curve` holds the loss of the optimisation after each chunk of steps.
    """

    weight: jax.Array
    grid: Grid
    shift: jax.Array
    loss: jax.Array
    nearest_loss: jax.Array
    inherited: jax.Array
    curve: Any = None


def solve(
    problems: Sequence[Problem],
    kind: Kind,
    options: Options,
    key: jax.Array,
    tick: Callable[[float, Any], None],
) -> list[Solution]:
    """Layers of one kind and shape, side by side."""
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *problems)
    if options.method in ("coordinate", "search"):
        found = _by_coordinates(stacked, kind=kind, options=options)
        tick(1.0, jnp.sum(found.loss))
    else:
        found = _by_adam(stacked, kind, options, key, tick)
    return [jax.tree.map(lambda v, i=i: v[i], found) for i in range(len(problems))]


def _layers(function: Callable) -> Callable:
    """A function of one layer for all layers of a stack; a single one is not batched."""

    @functools.wraps(function)
    def over(*args: Any, **static: Any) -> Any:
        one = functools.partial(function, **static)
        leaves = jax.tree.leaves(args)
        if leaves[0].shape[0] == 1:
            found = one(*jax.tree.map(lambda v: v[0], args))
            return jax.tree.map(lambda v: v[None], found)
        return jax.vmap(one)(*args)

    return over


def _known(problem: Problem, kind: Kind) -> Products:
    """The products that count: the bias takes what is constant, where there is one."""
    products, inputs = problem.inputs.products, problem.inputs
    if not kind.centred:
        return products
    return centred(products, inputs.mean, inputs.float_mean)


@functools.partial(
    jax.jit, static_argnames=("kind", "options"), compiler_options=compat.QUICK
)
@_layers
def _by_coordinates(problem: Problem, *, kind: Kind, options: Options) -> Solution:
    products = _known(problem, kind)
    target = best_weight(problem.weight, products, options.damping)
    gram = damped(products.gram, options.damping)
    grid, weight = problem.grid, problem.weight
    free = kind.free and kind.shared is not None and options.scales != "given"
    if free:
        grid = search_scales(
            target,
            grid.low,
            grid.high,
            gram,
            symmetric=kind.symmetric,
            blocks=kind.blocks,
            candidates=options.candidates,
            shared=kind.shared,
        ).grid
        shape = problem.grid.scale.shape
        grid = grid._replace(
            scale=jnp.broadcast_to(grid.scale, shape),
            zero_point=jnp.broadcast_to(grid.zero_point, shape),
        )
    if options.method == "search":
        return _chosen(problem, kind, target, nearest(weight, grid), grid)
    found = coordinate_descent(
        weight,
        grid,
        gram,
        target,
        sweeps=options.sweeps,
        start=options.start,
        damping=0.0,
        refit=free and options.scales == "refit",
        shared=kind.shared or (),
    )
    return _chosen(problem, kind, target, found.weight, found.grid)


def _chosen(
    problem: Problem, kind: Kind, best: jax.Array, rounded: jax.Array, grid: Grid
) -> Solution:
    """What was found, or nearest rounding where that is no worse, output by output.

    `best` are the real weights that the rounded ones approach.
    """
    products = _known(problem, kind)
    weight, plain = problem.weight, nearest(problem.weight, problem.grid)
    after = output_error(weight, rounded, products)
    before = output_error(weight, plain, products)
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
    inherited = output_error(weight, best, products)
    loss = jnp.where(gained, after, before)
    return Solution(rounded, grid, shift, loss, before, inherited)


def _by_adam(
    problem: Problem,
    kind: Kind,
    options: Options,
    key: jax.Array,
    tick: Callable[[float, Any], None],
) -> Solution:
    schedule = Schedule(
        options.iterations,
        options.warm_start,
        *options.beta_range,
        options.regularisation,
    )
    state, keys = _started(problem, key)
    data, unit = _data(problem, keys, kind=kind, options=options)
    size = max(1, -(-options.iterations // CHUNKS))
    curve = []
    for first in range(0, options.iterations, size):
        steps = min(size, options.iterations - first)
        state, error = _stepped(
            state,
            problem,
            data,
            schedule=schedule,
            steps=steps,
            kind=kind,
            rate=options.learning_rate,
            batch=options.batch,
        )
        curve.append(error * unit)
        tick(steps / options.iterations, jnp.sum(curve[-1]))
    found = _finished(problem, data, state, kind=kind, options=options)
    return found._replace(curve=jnp.stack(curve, axis=1) if curve else None)


@functools.partial(jax.jit, static_argnames=("kind", "options"))
@_layers
def _data(
    problem: Problem, key: jax.Array, *, kind: Kind, options: Options
) -> tuple[Any, jax.Array]:
    """What Adam sees, scaled so that its loss and the regulariser can be added up.

    In units in which nearest rounding costs as much as a quarter of the regulariser of all
    weights: the layer's own size must not decide whether weights come to a decision.
    """
    products = _known(problem, kind)
    if problem.rows is None:
        target = best_weight(problem.weight, products, options.damping)
        gram = damped(products.gram, options.damping)
        data: Any = GramData(gram, target)
        plain = nearest(problem.weight, problem.grid) - target
        level = jnp.sum(plain * jnp.matmul(gram, plain, precision="highest"))
    else:
        data = _rows(problem, kind, key)
        plain = nearest(problem.weight, problem.grid)
        level = jnp.sum(row_error(plain, data, kind.activation))
    worth = 0.25 * options.regularisation * problem.weight.size
    unit = jnp.where(level > 0, level / worth, 1.0)
    if isinstance(data, GramData):
        return data._replace(gram=data.gram / unit), unit
    return data._replace(unit=unit), unit


def _rows(problem: Problem, kind: Kind, key: jax.Array) -> RowData:
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
    return RowData(inputs, target, bias, lower=lower, upper=upper)


@jax.jit
def _started(problem: Problem, key: jax.Array) -> tuple[State, jax.Array]:
    """The states before the first step, and a key a layer for what comes before it."""
    number = problem.weight.shape[0]
    keys, others = jax.random.split(key, (2, number))
    return jax.vmap(start_adaround)(problem.weight, problem.grid, keys), others


@functools.partial(
    jax.jit, static_argnames=("schedule", "steps", "kind", "rate", "batch")
)
@_layers
def _stepped(
    state: State,
    problem: Problem,
    data: Any,
    *,
    schedule: Schedule,
    steps: int,
    kind: Kind,
    rate: float,
    batch: int,
) -> tuple[State, jax.Array]:
    state, trace = adaround(
        state,
        problem.weight,
        problem.grid,
        data,
        schedule,
        steps=steps,
        learning_rate=rate,
        batch=batch,
        activation=kind.activation,
    )
    return state, jnp.sum(trace.error[-1])


@functools.partial(jax.jit, static_argnames=("kind", "options"))
@_layers
def _finished(
    problem: Problem, data: Any, state: State, *, kind: Kind, options: Options
) -> Solution:
    """The hard weights; in terms of the rows where there are rows."""
    rounded = hard_weight(problem.weight, problem.grid, state.alpha)
    if isinstance(data, GramData):
        return _chosen(problem, kind, data.target, rounded, problem.grid)
    plain = nearest(problem.weight, problem.grid)
    best = best_weight(problem.weight, _known(problem, kind), options.damping)
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
