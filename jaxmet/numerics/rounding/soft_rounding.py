r"""AdaRound: whether each weight goes up or down, learnt as a smooth choice.

$$\tilde W = s\,(\mathrm{clip}(\lfloor W/s \rfloor + h(\alpha) + z,\ l,\ h) - z),\qquad
h(\alpha) = \mathrm{clip}(\sigma(\alpha)(\zeta - \gamma) + \gamma,\ 0,\ 1)$$

is trained to give the outputs of the float layer, while
$R = \sum 1 - |2h(\alpha) - 1|^\beta$ drives every $h$ to 0 or 1, the harder the smaller the
annealed $\beta$.

Nagel et al., [Up or Down? Adaptive Rounding for Post-Training
Quantization](https://arxiv.org/abs/2004.10568), ICML 2020.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxmet.numerics.rounding.levels import LevelGrid, steps_of
from jaxmet.numerics.rounding.quadratic import quadratic

ZETA, GAMMA = 1.1, -0.1
LEARNING_RATE = 1e-2

Scalar = Float[Array, ""] | float
Weight = Float[Array, "groups ins outs"]


class Schedule(NamedTuple):
    """How strongly the choice is pressed: not at all in the warm start, then with beta.

    The regulariser is a sum over weights, the error a mean over rows: where the error of
    nearest rounding is more than a few `regularisation` a weight, h stays between 0 and 1.
    `iterations` is the whole length; all of it may be data.
    """

    iterations: int | Int[Array, ""]
    warm_start: Scalar = 0.2
    beta_start: Scalar = 20.0
    beta_end: Scalar = 2.0
    regularisation: Scalar = 0.01


class GramData(NamedTuple):
    r"""The loss $\mathrm{tr}\,(\tilde W - W^*)^T G (\tilde W - W^*)$: all data, no rows."""

    gram: Float[Array, "groups ins ins"]
    target: Weight


class RowData(NamedTuple):
    """Inputs of the quantized network, what the float one makes of its own, and the bias.

    The target and the product with the bias both go through the activation, and between
    the bounds that are given. The loss is divided by `unit`.
    """

    inputs: Float[Array, "groups rows ins"]
    target: Float[Array, "groups rows outs"]
    bias: Float[Array, "groups outs"]
    unit: Float[Array, ""] | None = None
    lower: Float[Array, "groups outs"] | None = None
    upper: Float[Array, "groups outs"] | None = None


class State(NamedTuple):
    """Where an optimisation stands: all that the next step needs."""

    alpha: Weight
    moments: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]


class Trace(NamedTuple):
    """For each step the error and the regulariser of each group, before the step."""

    error: Float[Array, "steps groups"]
    regulariser: Float[Array, "steps groups"]


def rectified_sigmoid(alpha: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """h: a sigmoid stretched beyond 0 and 1 and cut there, so that it arrives.

    Args:
        alpha: a float array of any shape.

    Returns:
        h, of the same shape, from 0 to 1.
    """
    return jnp.clip(jax.nn.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_rectified_sigmoid(h: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The $\alpha$ with this h, from 0 to 1: $-\log((\zeta-\gamma)/(h-\gamma) - 1)$.

    Args:
        h: a float array of any shape, from 0 to 1.

    Returns:
        α, of the same shape.
    """
    return -jnp.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def beta_at(step: int | Int[Array, ""], schedule: Schedule) -> Float[Array, ""]:
    r"""$\beta_1 + \frac12 (\beta_0 - \beta_1)(1 + \cos \pi t)$, t from 0 after warm start to 1.

    Args:
        step: the number of the step, from 0.
        schedule: the length of the warm start and of the whole, and both ends of β.

    Returns:
        β, a float32 scalar.
    """
    step, iterations = (
        jnp.asarray(v, jnp.float32) for v in (step, schedule.iterations)
    )
    warm = schedule.warm_start * iterations
    t = jnp.clip((step - warm) / jnp.maximum(iterations - warm, 1.0), 0.0, 1.0)
    fallen = schedule.beta_start - schedule.beta_end
    return schedule.beta_end + 0.5 * fallen * (1 + jnp.cos(jnp.pi * t))


def regulariser(
    alpha: Weight, step: int | Int[Array, ""], schedule: Schedule
) -> Float[Array, " groups"]:
    """R of each group, times its weight; nothing during the warm start.

    Args:
        alpha: the choice of each weight, a float array (groups, ins, outs).
        step: the number of the step, from 0.
        schedule: β over the steps, and the weight of R.

    Returns:
        The weighted sum over each group, (groups,).
    """
    h = rectified_sigmoid(alpha)
    beta = beta_at(step, schedule).astype(alpha.dtype)
    total = jnp.sum(1 - jnp.abs(2 * h - 1) ** beta, axis=(1, 2))
    now, iterations = (jnp.asarray(v, jnp.float32) for v in (step, schedule.iterations))
    warm = now < schedule.warm_start * iterations
    return jnp.where(warm, 0.0, schedule.regularisation * total)


@jax.jit
def initial_alpha(weight: Weight, grid: LevelGrid) -> Weight:
    r"""Where the soft weights are the float ones: $h = W/s - \lfloor W/s \rfloor$.

    Args:
        weight: the float weight, (groups, ins, outs).
        grid: scale, zero point and ends of the grid.

    Returns:
        α, (groups, ins, outs).
    """
    ratio = lax.div(weight, steps_of(grid, weight.shape[1]).step)
    return inverse_rectified_sigmoid(ratio - jnp.floor(ratio))


@jax.jit
def soft_weight(weight: Weight, grid: LevelGrid, alpha: Weight) -> Weight:
    """The weight between two neighbours on the grid.

    Args:
        weight: the float weight, (groups, ins, outs).
        grid: scale, zero point and ends of the grid.
        alpha: the choice of each weight, of the same shape.

    Returns:
        The soft weight, (groups, ins, outs).
    """
    return _chosen(weight, grid, rectified_sigmoid(alpha))


@jax.jit
def hard_weight(weight: Weight, grid: LevelGrid, alpha: Weight) -> Weight:
    r"""The weight on the grid: up where $\alpha \ge 0$, down elsewhere.

    Args:
        weight: the float weight, (groups, ins, outs).
        grid: scale, zero point and ends of the grid.
        alpha: the choice of each weight, of the same shape.

    Returns:
        The rounded weight, (groups, ins, outs).
    """
    return _chosen(weight, grid, (alpha >= 0).astype(weight.dtype))


def _chosen(weight: Weight, grid: LevelGrid, up: Weight) -> Weight:
    step, lower, upper = steps_of(grid, weight.shape[1])
    return step * jnp.clip(jnp.floor(lax.div(weight, step)) + up, lower, upper)


def row_error(
    weight: Weight,
    data: RowData,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    *,
    by_output: bool = False,
) -> Float[Array, " groups"] | Float[Array, "groups outs"]:
    """The mean over rows of the squared distance of outputs, summed over outputs.

    Args:
        weight: a soft or rounded weight, (groups, ins, outs).
        data: rows of inputs, their targets, the bias and the bounds of what follows.
        activation: what follows the layer, a function of single numbers; default None: nothing.
        by_output: whether outputs are kept apart; default False.

    Returns:
        The error in units of `data.unit`: (groups,), or (groups, outs) with `by_output`.
    """
    output = jnp.matmul(data.inputs, weight) + data.bias[:, None]
    target = data.target
    if activation is not None:
        output, target = activation(output), activation(target)
    if data.lower is not None:
        output, target = (jnp.maximum(v, data.lower[:, None]) for v in (output, target))
    if data.upper is not None:
        output, target = (jnp.minimum(v, data.upper[:, None]) for v in (output, target))
    error = jnp.mean(jnp.square(output - target), axis=1)
    error = error if data.unit is None else error / data.unit
    return error if by_output else jnp.sum(error, axis=1)


def start_adaround(weight: Weight, grid: LevelGrid, key: Key[Array, ""]) -> State:
    """The state before the first step.

    Args:
        weight: the float weight, (groups, ins, outs).
        grid: scale, zero point and ends of the grid.
        key: the `jax.random.key` from which the rows of all steps are drawn.

    Returns:
        The state: α where the soft weights are the float ones, moments of zero.
    """
    alpha = initial_alpha(weight, grid)
    return State(alpha, optax.scale_by_adam().init(alpha), jnp.int32(0), key)


@partial(jax.jit, static_argnames=("steps", "batch", "activation"))
def adaround(
    state: State,
    weight: Weight,
    grid: LevelGrid,
    data: GramData | RowData,
    schedule: Schedule,
    *,
    steps: int,
    learning_rate: Scalar = LEARNING_RATE,
    batch: int = 256,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[State, Trace]:
    """So many steps of Adam, in one loop on the device; steps in parts are the same steps.

    From rows, each step draws `batch` neighbours, the same for all groups; all are taken if
    there are no more. Rows that lie in no order make each a fair sample. Groups never meet:
    layers side by side learn what they learn alone. An `activation` is part of what is
    compiled: give the same function again.

    Args:
        state: where the optimisation stands.
        weight: the float weight, (groups, ins, outs).
        grid: scale, zero point and ends of the grid.
        data: a Gram matrix with its target, or rows of inputs.
        schedule: the exponent β over the steps, and the weight of the regulariser.
        steps: how many steps are made.
        learning_rate: of Adam; default 0.01.
        batch: how many rows are drawn in each step; default 256.
        activation: what follows the layer, for rows; default None: nothing.

    Returns:
        The state after the steps, and error and regulariser before each of them, (steps, groups).
    """
    adam = optax.scale_by_adam()

    def loss(alpha: Weight, step: jax.Array, key: jax.Array) -> tuple:
        soft = _chosen(weight, grid, rectified_sigmoid(alpha))
        if isinstance(data, GramData):
            error = jnp.sum(quadratic(soft - data.target, data.gram), axis=1)
        else:
            error = row_error(soft, _drawn(data, batch, key), activation)
        pressure = regulariser(alpha, step, schedule)
        return jnp.sum(error) + jnp.sum(pressure), Trace(error, pressure)

    def one(state: State, _: None) -> tuple[State, Trace]:
        alpha, moments, step, key = state
        draw = jax.random.fold_in(key, step)
        gradient, trace = jax.grad(loss, has_aux=True)(alpha, step, draw)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integers
            move, moments = adam.update(gradient, moments)
        assert isinstance(move, jax.Array)
        return State(alpha - learning_rate * move, moments, step + 1, key), trace

    return lax.scan(one, state, length=steps)


def _drawn(data: RowData, batch: int, key: jax.Array) -> RowData:
    rows = data.inputs.shape[1]
    if rows <= batch:
        return data
    which, shift = jax.random.split(key)
    number = rows // batch
    first = batch * jax.random.randint(which, (), 0, number)
    first += jax.random.randint(shift, (), 0, rows - number * batch + 1)
    cut = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=batch, axis=1)
    return data._replace(inputs=cut(data.inputs), target=cut(data.target))
