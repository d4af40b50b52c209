r"""Channel scales that make the noise of rounding small beside the signal.

Dividing channels by $s$ changes the steps of all grids. With $x_i$ and $W_{io}$ an input and
the window of weights to an output, in original units, let an error of variance one of each
weight of the window disturb the outputs of the network by $G_{io}$, and one of the input by
$C_i$, as shares of the signal. Rounding then adds

$$N = \frac{\Delta_w^2}{12} \sum_{io} G_{io} \frac{s_o^2}{s_i^2}
      + \frac{\Delta_a^2}{12} \sum_i C_i s_i^2,$$

$$\Delta_w = \frac{\max_{io} |W_{io}| s_i / s_o}{2^{b-1}-1}, \qquad
\Delta_a = \frac{\max_i x_i / s_i - \min_i x_i / s_i}{2^b-1},$$

where a weight with one grid an output has $\Delta_{w,o}$, the maximum over $i$ alone, and
$s_o$ cancels. The objective is the sum over layers. Each term is an exponential of sums and
maxima of $\log s$: its logarithm is convex in $\log s$, and so is that of the sum.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int

from jaxmet.numerics.minimise import lbfgs
from jaxmet.numerics.scaling import Layers, log_scales

SHARPNESS = (4.0, 8.0, 16.0, 32.0)  # beyond, too many weights share one rounding error
EVALUATIONS = 100  # at each
REACH = 30.0  # of sharpness times the change of a log scale: exp of it is a float
FAINTEST = -60.0  # log of what stands for nothing, beside the largest of its kind


class NoisyLayers(NamedTuple):
    r"""Layers, and logarithms of what is known of them in original units.

    `gains[k][l, g, i, o]` is $G_{io}$ of the layers of one shape, `high` and `low` how far
    $x_i$ reaches above and below zero, `cost` is $C_i$. `weight_step` is
    $-\log 12(2^{b-1}-1)^2$ of the weight and `input_step` $-\log 12(2^b-1)^2$ of the input,
    -inf for what is not quantized. `per_channel` says which weights have one grid per output.
    """

    layers: Layers
    gains: tuple[Float[Array, "_ _ _ _"], ...]
    high: Float[Array, " ins"]
    low: Float[Array, " ins"]
    cost: Float[Array, " ins"]
    weight_step: Float[np.ndarray, " layers"]
    input_step: Float[np.ndarray, " layers"]
    per_channel: Bool[np.ndarray, " layers"]


class Minimum(NamedTuple):
    """Log scales, the log of the objective there, and where they started from."""

    x: Float[Array, " channels"]
    log_noise: Float[Array, ""]
    log_noise_before: Float[Array, ""]


class _Places(NamedTuple):
    """Which group each input and output belongs to, and which layer each group."""

    input_group: np.ndarray
    output_group: np.ndarray
    group_layer: np.ndarray

    @property
    def input_layer(self) -> np.ndarray:
        return self.group_layer[self.input_group]

    @property
    def output_layer(self) -> np.ndarray:
        return self.group_layer[self.output_group]


class _Shifts(NamedTuple):
    """The largest exponents of each layer, which keep sums of exponentials in range."""

    gain: jax.Array
    cost: jax.Array
    step: jax.Array
    high: jax.Array
    low: jax.Array


class _Near(NamedTuple):
    """The gains of all layers as they are at some scales, in units of their largest."""

    gains: tuple[jax.Array, ...]
    ins: jax.Array
    makes: jax.Array


def noisy(
    layers: Layers,
    gains: Sequence[Float[Array, "_ _ _ _"]],
    by_input: Sequence[Float[Array, " ins"]],
    weight_step: Float[np.ndarray, " layers"],
    input_step: Float[np.ndarray, " layers"],
    per_channel: Bool[np.ndarray, " layers"],
) -> NoisyLayers:
    """The logarithms of gains, and of reach up and down and cost by input.

    Zero becomes next to nothing beside the largest value of its layer.
    """
    at = _places(layers)
    faintest = float(np.exp(FAINTEST))

    def log_or_faint(x: jax.Array, unit: jax.Array) -> jax.Array:
        unit = jnp.where(unit > 0, unit, 1.0)
        return jnp.log(jnp.maximum(x / unit, faintest)) + jnp.log(unit)

    def of_input(x: jax.Array) -> jax.Array:
        return log_or_faint(x, _largest(x, at.input_layer)[at.input_layer])

    logs = [log_or_faint(g, jnp.max(g, (1, 2, 3), keepdims=True)) for g in gains]
    high, low, cost = map(of_input, by_input)
    return NoisyLayers(
        layers, tuple(logs), high, low, cost, weight_step, input_step, per_channel
    )


def log_noise(noisy: NoisyLayers, x: Float[Array, " channels"]) -> Float[Array, ""]:
    """The log of the objective.

    Args:
        noisy: what the objective knows of the layers.
        x: the log scales.

    Returns:
        The log of the noise.
    """
    return _exact(noisy, x, _tops(noisy, x))[0]


def minimise_noise(
    noisy: NoisyLayers,
    start: Float[Array, " channels"],
    free: Bool[Array, " channels"],
    *,
    lowest: Float[Array, " channels"],
    highest: Float[Array, " channels"],
    evaluations: int | Int[Array, ""] = EVALUATIONS,
) -> Minimum:
    r"""Log scales of little noise in `lowest … highest`, from `start`.

    What is not `free` keeps its scale.

    Maxima become $\frac1\beta\log\sum\exp\beta(\cdot)$ with growing $\beta$, and each such
    problem gets a few steps of L-BFGS; with no `evaluations` nothing moves. Sums over the many
    weights of a layer are products with matrices made once for each $\beta$, so a step costs
    what the products of two matrices and a vector do.

    Args:
        noisy: what the objective knows of the layers.
        start: the first log scales.
        free: which channels may be scaled.
        lowest: the lower bounds of log scales.
        highest: the upper bounds.
        evaluations: how often the objective is evaluated.

    Returns:
        The log scales, and the log of the noise there and at the start.
    """
    lowest, highest = (jnp.where(free, b, start) for b in (lowest, highest))

    def stage(state: tuple[jax.Array, Minimum], now: tuple) -> tuple:
        x, best = state
        sharpness, allowed = now
        tops = _tops(noisy, x)
        value, shifts, near = _exact(noisy, x, tops)
        first = jnp.isinf(best.log_noise_before)
        before = jnp.where(first, value, best.log_noise_before)
        wins = value < best.log_noise
        here = Minimum(x, value, before)
        best = best._replace(log_noise_before=before)
        best = jax.tree.map(lambda a, b: jnp.where(wins, a, b), here, best)
        reach = REACH / sharpness
        x = lbfgs(
            _smooth(noisy, x, tops, shifts, near, sharpness),
            x,
            jnp.maximum(lowest, x - reach),
            jnp.minimum(highest, x + reach),
            evaluations=allowed,
        )
        return (x, best), None

    # The last turn only looks at what the one before it found.
    sharpness = jnp.asarray((*SHARPNESS, SHARPNESS[-1]), start.dtype)
    allowed = jnp.asarray((1,) * len(SHARPNESS) + (0,)) * evaluations
    unknown = jnp.full((), jnp.inf, start.dtype)
    state = (start, Minimum(start, unknown, unknown))
    (_, best), _ = jax.lax.scan(stage, state, (sharpness, allowed))
    return best


def _places(layers: Layers) -> _Places:
    inputs, outputs, groups, group, layer = [], [], [], 0, 0
    for stack in layers.log_ranges:
        count, per_layer, ins, outs = stack.shape
        numbers = group + np.arange(count * per_layer)
        inputs.append(np.repeat(numbers, ins))
        outputs.append(np.repeat(numbers, outs))
        groups.append(np.repeat(layer + np.arange(count), per_layer))
        group, layer = group + numbers.size, layer + count
    return _Places(*map(np.concatenate, (inputs, outputs, groups)))


def _sums(v: jax.Array, segments: np.ndarray) -> jax.Array:
    number = int(segments[-1]) + 1
    return jax.ops.segment_sum(v, segments, number, indices_are_sorted=True)


def _largest(v: jax.Array, segments: np.ndarray) -> jax.Array:
    number = int(segments[-1]) + 1
    return jax.ops.segment_max(v, segments, number, indices_are_sorted=True)


def _tops(noisy: NoisyLayers, x: jax.Array) -> jax.Array:
    """For each output the log of the largest weight, in the scales of the inputs."""
    layers = noisy.layers
    each = layers.by_input(log_scales(x, layers.inputs))
    tops = []
    for r, ins in zip(layers.log_ranges, each, strict=True):
        top = jnp.max(r + ins[..., None], axis=2)
        largest = jnp.max(top, axis=(1, 2), keepdims=True)
        floor = jnp.where(jnp.isfinite(largest), largest, 0.0) + FAINTEST
        tops.append(jnp.maximum(top, floor).reshape(-1))
    return jnp.concatenate(tops)


def _exact(
    noisy: NoisyLayers, x: jax.Array, tops: jax.Array
) -> tuple[jax.Array, _Shifts, _Near]:
    """The log of the objective, the largest exponents in it, and the gains."""
    at = _places(noisy.layers)
    ins, outs = (log_scales(x, i) for i in noisy.layers[1:3])
    makes = jnp.where(noisy.per_channel[at.output_layer], tops, outs)
    each = zip(
        noisy.gains,
        noisy.layers.by_input(ins),
        noisy.layers.by_output(makes),
        strict=True,
    )
    moved = [g + 2 * (o[:, :, None] - i[..., None]) for g, i, o in each]
    shift = [jnp.max(g, (1, 2, 3)) for g in moved]
    near = [
        jnp.exp(g - v[:, None, None, None]) for g, v in zip(moved, shift, strict=True)
    ]
    shifts = _Shifts(
        gain=jnp.concatenate(shift),
        cost=_largest(noisy.cost + 2 * ins, at.input_layer),
        step=_largest(tops - outs, at.output_layer),
        high=_largest(noisy.high - ins, at.input_layer),
        low=_largest(noisy.low - ins, at.input_layer),
    )
    reach = jnp.logaddexp(shifts.high, shifts.low)
    found = _Near(tuple(near), ins, makes)
    total = _total(noisy, at, ins, makes, shifts.step, reach, shifts, found)
    return total, shifts, found


def _smooth(
    noisy: NoisyLayers,
    x: jax.Array,
    tops: jax.Array,
    shifts: _Shifts,
    near: _Near,
    sharpness: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    """The objective with soft maxima, for scales near `x`."""
    at, layers = _places(noisy.layers), noisy.layers
    old = log_scales(x, layers.inputs)
    matrices = [
        jnp.exp(sharpness * (r + i[..., None] - top[:, :, None]))
        for r, i, top in zip(
            layers.log_ranges, layers.by_input(old), layers.by_output(tops), strict=True
        )
    ]

    def soft(v: jax.Array, segments: np.ndarray, shift: jax.Array) -> jax.Array:
        total = _sums(jnp.exp(sharpness * (v - shift[segments])), segments)
        return shift + jnp.log(total) / sharpness

    def function(new: jax.Array) -> jax.Array:
        ins, outs = (log_scales(new, i) for i in layers[1:3])
        moved = layers.by_input(jnp.exp(sharpness * (ins - old)))
        total = _over_inputs(matrices, moved)
        soft_tops = tops + jnp.log(total + 1e-30) / sharpness
        step = soft(soft_tops - outs, at.output_layer, shifts.step)
        high = soft(noisy.high - ins, at.input_layer, shifts.high)
        low = soft(noisy.low - ins, at.input_layer, shifts.low)
        reach = jnp.logaddexp(high, low)
        makes = jnp.where(noisy.per_channel[at.output_layer], soft_tops, outs)
        return _total(noisy, at, ins, makes, step, reach, shifts, near)

    return function


def _over_inputs(
    matrices: Sequence[jax.Array], vectors: Sequence[jax.Array]
) -> jax.Array:
    """Products of matrices (layers, groups, ins, outs) and vectors of inputs, in a row."""
    pairs = zip(matrices, vectors, strict=True)
    each = [jnp.einsum("lgio,lgi->lgo", m, v, precision="highest") for m, v in pairs]
    return jnp.concatenate([one.reshape(-1) for one in each])


def _total(
    noisy: NoisyLayers,
    at: _Places,
    ins: jax.Array,
    makes: jax.Array,
    step: jax.Array,
    reach: jax.Array,
    shifts: _Shifts,
    near: _Near,
) -> jax.Array:
    """The log of the sum over layers of the noise of weights and of inputs.

    `makes` is what multiplies the error of a weight on its way out: the scale of the output,
    or, with one grid per output, the largest weight.
    """
    read = noisy.layers.by_input(jnp.exp(2 * (near.ins - ins)))
    made = jnp.exp(2 * (makes - near.makes)) * _over_inputs(near.gains, read)
    weights = jnp.log(_sums(made, at.output_layer)) + shifts.gain
    weights = weights + jnp.where(noisy.per_channel, 0.0, 2 * step)
    lifted = jnp.exp(noisy.cost + 2 * ins - shifts.cost[at.input_layer])
    inputs = jnp.log(_sums(lifted, at.input_layer)) + shifts.cost + 2 * reach
    known = [noisy.weight_step, noisy.input_step]
    steps = jnp.asarray(np.concatenate(known), weights.dtype)
    return logsumexp(steps + jnp.concatenate([weights, inputs]))
