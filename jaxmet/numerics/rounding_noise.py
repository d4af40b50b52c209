r"""Channel scales that make the noise of rounding small beside the signal.

Dividing channels by $s$ changes the steps of all grids. With $x_i$, $W_{io}$ and $y_o$ an
input, the window of weights and an output in original units, rounding adds to $y_o$ a
noise of variance

$$N_o = s_o^2 \frac{\Delta_w^2}{12} \sum_i \frac{E\|x_i\|^2}{s_i^2}
      + \frac{\Delta_a^2}{12} \sum_i \|W_{io}\|^2 s_i^2,$$

$$\Delta_w = \frac{\max_{io} |W_{io}| s_i / s_o}{2^{b-1}-1}, \qquad
\Delta_a = \frac{\max_i x_i / s_i - \min_i x_i / s_i}{2^b-1},$$

where a weight with one grid an output has $\Delta_{w,o}$, the maximum over $i$ alone, and
$s_o$ cancels. The objective is the sum over layers of the mean of $N_o/\mathrm{Var}\,y_o$
over the outputs. Each term is an exponential of sums and maxima of $\log s$: its logarithm
is convex in $\log s$, and so is that of the sum.
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

SHARPNESS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
EVALUATIONS = 100  # at each
REACH = 30.0  # of sharpness times the change of a log scale: exp of it is a float
FAINTEST = -60.0  # log of what stands for nothing, beside the largest of its kind


class NoisyLayers(NamedTuple):
    r"""Layers, and logarithms of what is known of them in original units.

    `power` is $E\|x_i\|^2$ summed over the window, `high` and `low` how far $x_i$ reaches
    above and below zero, `cost` the mean over all outputs of
    $\|W_{io}\|^2/\mathrm{Var}\,y_o$, `share` that of $1/\mathrm{Var}\,y_o$.
    `weight_step` is $-\log 12(2^{b-1}-1)^2$ of the weight and `input_step`
    $-\log 12(2^b-1)^2$ of the input, -inf for what is not quantized. `per_channel` says
    which weights have one grid an output.
    """

    layers: Layers
    power: Float[Array, " ins"]
    high: Float[Array, " ins"]
    low: Float[Array, " ins"]
    cost: Float[Array, " ins"]
    share: Float[Array, " outs"]
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

    power: jax.Array
    share: jax.Array
    cost: jax.Array
    step: jax.Array
    high: jax.Array
    low: jax.Array


def noisy(
    layers: Layers,
    by_input: Sequence[Float[Array, " ins"]],
    share: Float[Array, " outs"],
    weight_step: Float[np.ndarray, " layers"],
    input_step: Float[np.ndarray, " layers"],
    per_channel: Bool[np.ndarray, " layers"],
) -> NoisyLayers:
    """The logarithms of power, high, low and cost by input and of share by output.

    Zero becomes next to nothing beside the largest value of its layer.
    """
    at = _places(layers)

    def log_or_faint(x: jax.Array, layer: np.ndarray) -> jax.Array:
        largest = _largest(x, layer)
        unit = jnp.where(largest > 0, largest, 1.0)[layer]
        return jnp.log(jnp.maximum(x / unit, float(np.exp(FAINTEST)))) + jnp.log(unit)

    power, high, low, cost = (log_or_faint(v, at.input_layer) for v in by_input)
    share = log_or_faint(share, at.output_layer)
    return NoisyLayers(
        layers, power, high, low, cost, share, weight_step, input_step, per_channel
    )


def log_noise(noisy: NoisyLayers, x: Float[Array, " channels"]) -> Float[Array, ""]:
    """The log of the objective."""
    return _exact(noisy, x, _tops(noisy, x))[0]


def minimise_noise(
    noisy: NoisyLayers,
    start: Float[Array, " channels"],
    free: Bool[Array, " channels"],
    *,
    limit: float = 1e6,
    evaluations: int | Int[Array, ""] = EVALUATIONS,
) -> Minimum:
    r"""Log scales of little noise, from `start`; what is not `free` keeps its scale.

    Maxima become $\frac1\beta\log\sum\exp\beta(\cdot)$ with growing $\beta$, and each such
    problem gets a few steps of L-BFGS; with no `evaluations` nothing moves. Over the many
    inputs of a layer the sum is a product with a matrix made once for each $\beta$, so a
    step costs what the products of those matrices and one vector do.
    """
    bound = float(np.log(limit))
    lowest, highest = jnp.where(free, -bound, start), jnp.where(free, bound, start)

    def stage(state: tuple[jax.Array, Minimum], now: tuple) -> tuple:
        x, best = state
        sharpness, allowed = now
        tops = _tops(noisy, x)
        value, shifts = _exact(noisy, x, tops)
        first = jnp.isinf(best.log_noise_before)
        before = jnp.where(first, value, best.log_noise_before)
        wins = value < best.log_noise
        here = Minimum(x, value, before)
        best = best._replace(log_noise_before=before)
        best = jax.tree.map(lambda a, b: jnp.where(wins, a, b), here, best)
        reach = REACH / sharpness
        x = lbfgs(
            _smooth(noisy, x, tops, shifts, sharpness),
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
) -> tuple[jax.Array, _Shifts]:
    """The log of the objective, and the largest exponents in it."""
    at = _places(noisy.layers)
    ins, outs = (log_scales(x, i) for i in noisy.layers[1:])
    makes = jnp.where(noisy.per_channel[at.output_layer], tops, outs)
    shifts = _Shifts(
        power=_largest(noisy.power - 2 * ins, at.input_layer),
        share=_largest(noisy.share + 2 * makes, at.output_layer),
        cost=_largest(noisy.cost + 2 * ins, at.input_layer),
        step=_largest(tops - outs, at.output_layer),
        high=_largest(noisy.high - ins, at.input_layer),
        low=_largest(noisy.low - ins, at.input_layer),
    )
    reach = jnp.logaddexp(shifts.high, shifts.low)
    return _total(noisy, at, ins, outs, tops, shifts.step, reach, shifts), shifts


def _smooth(
    noisy: NoisyLayers,
    x: jax.Array,
    tops: jax.Array,
    shifts: _Shifts,
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
        ins, outs = (log_scales(new, i) for i in layers[1:])
        moved = layers.by_input(jnp.exp(sharpness * (ins - old)))
        total = [
            jnp.einsum("lgio,lgi->lgo", m, v, precision="highest").reshape(-1)
            for m, v in zip(matrices, moved, strict=True)
        ]
        soft_tops = tops + jnp.log(jnp.concatenate(total) + 1e-30) / sharpness
        step = soft(soft_tops - outs, at.output_layer, shifts.step)
        high = soft(noisy.high - ins, at.input_layer, shifts.high)
        low = soft(noisy.low - ins, at.input_layer, shifts.low)
        reach = jnp.logaddexp(high, low)
        return _total(noisy, at, ins, outs, soft_tops, step, reach, shifts)

    return function


def _total(
    noisy: NoisyLayers,
    at: _Places,
    ins: jax.Array,
    outs: jax.Array,
    tops: jax.Array,
    step: jax.Array,
    reach: jax.Array,
    shifts: _Shifts,
) -> jax.Array:
    """The log of the sum over layers of the noise of weights and of inputs."""

    def exponentials(v: jax.Array, layer: np.ndarray, shift: jax.Array) -> jax.Array:
        return jnp.exp(v - shift[layer])

    makes = jnp.where(noisy.per_channel[at.output_layer], tops, outs)
    made = exponentials(noisy.share + 2 * makes, at.output_layer, shifts.share)
    read = exponentials(noisy.power - 2 * ins, at.input_layer, shifts.power)
    both = _sums(made, at.output_group) * _sums(read, at.input_group)
    weights = jnp.log(_sums(both, at.group_layer)) + shifts.share + shifts.power
    weights = weights + jnp.where(noisy.per_channel, 0.0, 2 * step)
    cost = exponentials(noisy.cost + 2 * ins, at.input_layer, shifts.cost)
    inputs = jnp.log(_sums(cost, at.input_layer)) + shifts.cost + 2 * reach
    known = [noisy.weight_step, noisy.input_step]
    steps = jnp.asarray(np.concatenate(known), weights.dtype)
    return logsumexp(steps + jnp.concatenate([weights, inputs]))
