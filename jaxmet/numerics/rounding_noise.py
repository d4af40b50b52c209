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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Bool, Float

from jaxmet.numerics import xp
from jaxmet.numerics.minimise import lbfgs
from jaxmet.numerics.packed import (
    Packed,
    largest_by_layer,
    largest_by_output,
    moved,
    pack,
    total_by_output,
)
from jaxmet.numerics.scaling import Layers, cut_back, filled, log_scales
from jaxmet.numerics.xp import Array

SHARPNESS = (4.0, 8.0, 16.0, 32.0)  # beyond, too many weights share one rounding error
EVALUATIONS = 100  # at each
REACH = 30.0  # of sharpness times the change of a log scale: exp of it is a float
FAINTEST = -60.0  # log of what counts as nothing, beside the largest of its kind


class NoisyLayers(NamedTuple):
    r"""Layers, and logarithms of what is known of them in original units.

    `gains` holds $G_{io}$, `high` and `low` how far $x_i$ reaches above and below zero, `cost`
    is $C_i$. `weight_step` is $-\log 12(2^{b-1}-1)^2$ of the weight and `input_step`
    $-\log 12(2^b-1)^2$ of the input, -inf for what is not quantized. `per_channel` says which
    weights have one grid per output. Vectors are filled up as those of `Layers` are.
    """

    layers: Layers
    gains: Packed
    high: Float[Array, " ins"]
    low: Float[Array, " ins"]
    cost: Float[Array, " ins"]
    weight_step: Float[Array, " layers"]
    input_step: Float[Array, " layers"]
    per_channel: Bool[Array, " layers"]

    @property
    def apart(self) -> Array:
        """Which outputs have a grid of their own."""
        return self.per_channel[self.layers.output_layer]


class Minimum(NamedTuple):
    """Log scales, the log of the objective there, and at the points that were given."""

    x: Float[Array, " channels"]
    log_noise: Float[Array, ""]
    given: Float[Array, " points"]


class _Shifts(NamedTuple):
    """The largest exponents of each layer, which keep sums of exponentials in range."""

    gain: jax.Array
    cost: jax.Array
    step: jax.Array
    high: jax.Array
    low: jax.Array


class _Near(NamedTuple):
    """The gains of all layers as they are at some scales, in units of their largest."""

    gains: Packed
    ins: jax.Array
    makes: jax.Array


def noisy(
    layers: Layers,
    gains: Sequence[Float[Array, "_ _ _"]],
    by_input: Sequence[Sequence[Float[Array, " _"]]],
    weight_step: Sequence[float],
    input_step: Sequence[float],
    per_channel: Sequence[bool],
) -> NoisyLayers:
    """The logarithms of gains, and of reach up and down and cost by input.

    Zero becomes next to nothing beside the largest value of its layer.

    Args:
        layers: the log ranges of weights, and the channels along them.
        gains: the gains of each layer, a float array (groups, ins, outs).
        by_input: three lists of vectors, one per layer: how far inputs reach above zero, how far
            below, and their cost.
        weight_step: the log of a twelfth of each weight's squared step, for a range of 1; -inf
            for what is not quantized.
        input_step: that of each input, likewise.
        per_channel: whether each weight has one grid per output.

    Returns:
        The layers with these logarithms, vectors filled up to one of few sizes.
    """
    faintest = float(np.exp(FAINTEST))

    def log_or_faint(x: Array) -> Array:
        unit = xp.max(x)
        unit = xp.where(unit > 0, unit, 1.0)
        return xp.log(xp.maximum(x / unit, faintest)) + xp.log(unit)

    ins, number = layers.input_group.size, layers.group_layer.size

    def in_a_row(rows: Sequence[Array]) -> Array:
        row = xp.concatenate([log_or_faint(x) for x in rows])
        return xp.pad(row, (0, ins - row.size), constant_values=FAINTEST)

    def of_layers(values: Sequence[float | bool], fill: float | bool) -> Any:
        full = np.pad(values, (0, number - len(values)), constant_values=fill)
        return full.astype(bool if full.dtype == bool else gains[0].dtype)

    high, low, cost = map(in_a_row, by_input)
    return NoisyLayers(
        layers,
        pack([log_or_faint(g) for g in gains], -xp.inf),
        high,
        low,
        cost,
        of_layers(weight_step, -xp.inf),
        of_layers(input_step, -xp.inf),
        of_layers(per_channel, False),
    )


def log_noise(noisy: NoisyLayers, x: Float[Array, " channels"]) -> Float[Array, ""]:
    """The log of the objective.

    Args:
        noisy: what the objective knows of the layers.
        x: the log scales.

    Returns:
        The log of the noise.
    """
    none = xp.zeros_like(x) > 0
    found = minimise_noise(noisy, [x], none, lowest=x, highest=x, evaluations=0)
    return found.log_noise


def minimise_noise(
    noisy: NoisyLayers,
    starts: Sequence[Float[Array, " channels"]],
    free: Bool[Array, " channels"],
    *,
    lowest: Float[Array, " channels"],
    highest: Float[Array, " channels"],
    evaluations: int = EVALUATIONS,
    compare: Sequence[Float[Array, " channels"]] = (),
) -> Minimum:
    r"""Log scales of little noise in `lowest … highest`, from the best of some `starts`.

    What is not `free` keeps its scale, which has to be the same in all of them.

    Maxima become $\frac1\beta\log\sum\exp\beta(\cdot)$ with growing $\beta$, and each such
    problem gets a few steps of L-BFGS; with no `evaluations` nothing moves. Sums over the many
    weights of a layer are products with matrices made once for each $\beta$, so a step costs
    what the products of two matrices and a vector do. The objective is convex in log s: where
    the search begins decides only how soon it ends.

    Args:
        noisy: what the objective knows of the layers.
        starts: log scales to begin with.
        free: which channels may be scaled.
        lowest: the lower bounds of log scales.
        highest: the upper bounds.
        evaluations: how often the objective is evaluated at each sharpness; default 100.
        compare: log scales at which the objective is wanted too; default none.

    Returns:
        The log scales, the log of the noise there, and at `compare` and at the starts.
    """
    lowest, highest = (xp.where(free, b, starts[0]) for b in (lowest, highest))
    points = xp.stack([filled(v, 0.0) for v in (*compare, *starts)])
    counts = [0] * len(points) + [evaluations] * len(SHARPNESS) + [0]
    sharpness = [1.0] * len(points) + [*SHARPNESS, SHARPNESS[-1]]
    # Before the first turn that moves: which points are looked at, and which can be taken.
    looked = [*range(len(points))] + [-1] * (len(SHARPNESS) + 1)
    taken = [i >= len(compare) for i in range(len(points) + len(SHARPNESS) + 1)]
    turns = _Turn(
        xp.asarray(looked, np.int32),
        xp.asarray(taken),
        xp.asarray(sharpness, points.dtype),
        xp.asarray(counts, np.int32),
    )
    bounds = (filled(v, 0.0) for v in (lowest, highest))
    x, value, values = _minimised(noisy, points, *bounds, turns)
    return Minimum(cut_back(x, free.size), value, values[: len(points)])


class _Turn(NamedTuple):
    """One turn: which point it begins at (-1: the best, or where the last one ended)."""

    point: Array
    counts: Array  # whether what it looks at may be the answer
    sharpness: Array
    evaluations: Array


class _Search(NamedTuple):
    x: jax.Array
    best: jax.Array
    value: jax.Array  # of the best
    moved: jax.Array  # whether any turn has moved


@xp.compiled
def _minimised(
    noisy: NoisyLayers,
    points: jax.Array,
    lowest: jax.Array,
    highest: jax.Array,
    turns: _Turn,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best point, its value, and the value that each turn began with.

    One loop for the points that are only looked at and for the search: the objective is large,
    and is compiled once.
    """

    def turn(s: _Search, now: _Turn) -> tuple[_Search, jax.Array]:
        x = jnp.where(s.moved, s.x, s.best)
        x = jnp.where(now.point < 0, x, points[now.point])
        tops = _tops(noisy, x)
        value, shifts, near = _exact(noisy, x, tops)
        wins = now.counts & (value < s.value)
        best = jnp.where(wins, x, s.best)
        reach = REACH / now.sharpness
        x = lbfgs(
            _smooth(noisy, x, tops, shifts, near, now.sharpness),
            x,
            jnp.maximum(lowest, x - reach),
            jnp.minimum(highest, x + reach),
            evaluations=now.evaluations,
        )
        moved = s.moved | (now.evaluations > 0)
        return _Search(x, best, jnp.where(wins, value, s.value), moved), value

    first = points[-1]
    none = _Search(first, first, jnp.full((), jnp.inf, first.dtype), jnp.bool_(False))
    found, values = jax.lax.scan(turn, none, turns)
    return found.best, found.value, values


def _sums(v: jax.Array, layer: Array, number: int) -> jax.Array:
    return jax.ops.segment_sum(v, layer, number)


def _largest(v: jax.Array, layer: Array, number: int) -> jax.Array:
    """The largest value of each layer, zero for a layer without any."""
    found = jax.ops.segment_max(v, layer, number)
    return jnp.where(jnp.isfinite(found), found, 0.0)


def _tops(noisy: NoisyLayers, x: jax.Array) -> jax.Array:
    """For each output the log of the largest weight, in the scales of the inputs."""
    layers, number = noisy.layers, noisy.per_channel.size
    ins, outs = log_scales(x, layers.inputs), layers.output_layer.size
    top = largest_by_output(layers.log_ranges, layers.at, ins, outs)
    floor = _largest(top, layers.output_layer, number) + FAINTEST
    return jnp.maximum(top, floor[layers.output_layer])


def _exact(
    noisy: NoisyLayers, x: jax.Array, tops: jax.Array
) -> tuple[jax.Array, _Shifts, _Near]:
    """The log of the objective, the largest exponents in it, and the gains."""
    layers, number = noisy.layers, noisy.per_channel.size
    ins, outs = (log_scales(x, i) for i in (layers.inputs, layers.outputs))
    makes = jnp.where(noisy.apart, tops, outs)
    gains = moved(noisy.gains, layers.at, -2 * ins, 2 * makes)
    shift = largest_by_layer(gains, layers.at, layers.output_layer, number)
    tiles = layers.output_layer[layers.at.columns[:, 0]]
    entries = layers.output_layer[layers.at.entry_columns]
    near = Packed(
        jnp.exp(gains.tiles - shift[tiles][:, None, None]),
        jnp.exp(gains.entries - shift[entries]),
    )
    shifts = _Shifts(
        gain=shift,
        cost=_largest(noisy.cost + 2 * ins, layers.input_layer, number),
        step=_largest(tops - outs, layers.output_layer, number),
        high=_largest(noisy.high - ins, layers.input_layer, number),
        low=_largest(noisy.low - ins, layers.input_layer, number),
    )
    reach = jnp.logaddexp(shifts.high, shifts.low)
    found = _Near(near, ins, makes)
    total = _total(noisy, ins, makes, shifts.step, reach, shifts, found)
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
    layers, number = noisy.layers, noisy.per_channel.size
    old = log_scales(x, layers.inputs)
    raised = moved(layers.log_ranges, layers.at, old, -tops)
    matrices = jax.tree.map(lambda v: jnp.exp(sharpness * v), raised)

    def soft(v: jax.Array, layer: Array, shift: jax.Array) -> jax.Array:
        total = _sums(jnp.exp(sharpness * (v - shift[layer])), layer, number)
        return shift + _log(total) / sharpness

    def function(new: jax.Array) -> jax.Array:
        ins, outs = (log_scales(new, i) for i in (layers.inputs, layers.outputs))
        grown = jnp.exp(sharpness * (ins - old))
        total = total_by_output(matrices, layers.at, grown, outs.size)
        soft_tops = tops + jnp.log(total + 1e-30) / sharpness
        step = soft(soft_tops - outs, layers.output_layer, shifts.step)
        high = soft(noisy.high - ins, layers.input_layer, shifts.high)
        low = soft(noisy.low - ins, layers.input_layer, shifts.low)
        reach = jnp.logaddexp(high, low)
        makes = jnp.where(noisy.apart, soft_tops, outs)
        return _total(noisy, ins, makes, step, reach, shifts, near)

    return function


def _log(x: jax.Array) -> jax.Array:
    """log x, zero for what belongs to no layer."""
    return jnp.log(jnp.where(x > 0, x, 1.0))


def _total(
    noisy: NoisyLayers,
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
    layers, number = noisy.layers, noisy.per_channel.size
    read = jnp.exp(2 * (near.ins - ins))
    made = jnp.exp(2 * (makes - near.makes))
    made = made * total_by_output(near.gains, layers.at, read, makes.size)
    weights = _log(_sums(made, layers.output_layer, number)) + shifts.gain
    weights = weights + jnp.where(noisy.per_channel, 0.0, 2 * step)
    lifted = jnp.exp(noisy.cost + 2 * ins - shifts.cost[layers.input_layer])
    inputs = _log(_sums(lifted, layers.input_layer, number)) + shifts.cost + 2 * reach
    weights, inputs = weights + noisy.weight_step, inputs + noisy.input_step
    return logsumexp(jnp.concatenate([weights, inputs]))
