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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int

from jaxmet.numerics.minimise import lbfgs
from jaxmet.numerics.scaling import log_scales

SHARPNESS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
EVALUATIONS = 40  # of each
REACH = 30.0  # of sharpness times the change of a log scale: exp of it is a float
FAINTEST = -60.0  # log of what stands for nothing, beside the largest of its kind


class NoisyLayers(NamedTuple):
    """Layers of one shape; all but the indices are logarithms, in original units.

    `log_range` as in `scaling.Layers`. `power` is $E\\|x_i\\|^2$ summed over the window,
    `high` and `low` how far $x_i$ reaches above and below zero, `cost` the mean over all
    outputs of $\\|W_{io}\\|^2/\\mathrm{Var}\\,y_o$, `share` that of
    $1/\\mathrm{Var}\\,y_o$. `weight_step` is $-\\log 12(2^{b-1}-1)^2$ of the weight and
    `input_step` $-\\log 12(2^b-1)^2$ of the input, -inf for what is not quantized.
    """

    log_range: Float[Array, "layers groups ins outs"]
    inputs: Int[np.ndarray, "factors layers groups ins"]
    outputs: Int[np.ndarray, "factors layers groups outs"]
    power: Float[Array, "layers groups ins"]
    high: Float[Array, "layers groups ins"]
    low: Float[Array, "layers groups ins"]
    cost: Float[Array, "layers groups ins"]
    share: Float[Array, "layers groups outs"]
    weight_step: Float[Array, " layers"]
    input_step: Float[Array, " layers"]
    per_channel: bool


class Minimum(NamedTuple):
    """Log scales and the log of the objective there."""

    x: Float[Array, " channels"]
    log_noise: Float[Array, ""]


def log_or_faint(x: Float[Array, "..."], axis: tuple[int, ...]) -> Float[Array, "..."]:
    """The logarithm, with zeros taken as next to nothing beside the largest on `axis`."""
    largest = jnp.max(x, axis=axis, keepdims=True, initial=0.0)
    floor = jnp.where(largest > 0, largest, 1.0)
    logs = jnp.log(jnp.maximum(x / floor, np.exp(FAINTEST))) + jnp.log(floor)
    return logs


def log_noise(
    layers: Sequence[NoisyLayers], x: Float[Array, " channels"]
) -> Float[Array, ""]:
    """The log of the objective."""
    tops = [_tops(layer, x) for layer in layers]
    return _total(layers, x, tops, _largest)


def minimise_noise(
    layers: Sequence[NoisyLayers],
    start: Float[Array, " channels"],
    free: Bool[Array, " channels"],
    *,
    limit: float = 1e6,
) -> Minimum:
    r"""Log scales of little noise, from `start`; what is not `free` keeps its scale.

    Maxima become $\frac1\beta\log\sum\exp\beta(\cdot)$ with growing $\beta$, and each such
    problem gets a few steps of L-BFGS. Over the many inputs of a layer the sum is a product
    with a matrix made once for each $\beta$, so a step costs what a matrix and a vector do.
    """
    bound = jnp.where(free, float(np.log(limit)), 0.0).astype(start.dtype)
    lowest = jnp.where(free, -bound, start)
    highest = jnp.where(free, bound, start)

    def stage(state: tuple[jax.Array, Minimum], now: tuple) -> tuple:
        x, best = state
        sharpness, evaluations = now
        tops = [_tops(layer, x) for layer in layers]
        value = _total(layers, x, tops, _largest)
        wins = value < best.log_noise
        best = jax.tree.map(lambda a, b: jnp.where(wins, a, b), Minimum(x, value), best)
        reach = REACH / sharpness
        x = lbfgs(
            _smooth(layers, x, tops, sharpness),
            x,
            jnp.maximum(lowest, x - reach),
            jnp.minimum(highest, x + reach),
            evaluations=evaluations,
        )
        return (x, best), value

    # The last turn only looks at what the one before it found.
    sharpness = jnp.asarray((*SHARPNESS, SHARPNESS[-1]), start.dtype)
    evaluations = jnp.asarray((EVALUATIONS,) * len(SHARPNESS) + (0,))
    nothing = Minimum(start, jnp.full((), jnp.inf, start.dtype))
    (_, best), _ = jax.lax.scan(stage, (start, nothing), (sharpness, evaluations))
    return best


def _tops(layer: NoisyLayers, x: jax.Array) -> jax.Array:
    """For each output the largest weight in the scales of the inputs: (layers, groups, outs)."""
    ins = log_scales(x, layer.inputs)
    top = jnp.max(layer.log_range + ins[..., None], axis=2)
    largest = jnp.max(top, axis=(1, 2), keepdims=True)
    return jnp.maximum(top, jnp.where(jnp.isfinite(largest), largest, 0.0) + FAINTEST)


def _smooth(
    layers: Sequence[NoisyLayers],
    x: jax.Array,
    tops: list[jax.Array],
    sharpness: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    """The objective with soft maxima, for scales near `x`."""
    matrices, scales = [], []
    for layer, top in zip(layers, tops, strict=True):
        ins = log_scales(x, layer.inputs)
        matrices.append(
            jnp.exp(sharpness * (layer.log_range + ins[..., None] - top[:, :, None]))
        )
        scales.append(ins)

    def function(new: jax.Array) -> jax.Array:
        soft = []
        for layer, top, ins, m in zip(layers, tops, scales, matrices, strict=True):
            moved = jnp.exp(sharpness * (log_scales(new, layer.inputs) - ins))
            total = jnp.einsum("lgio,lgi->lgo", m, moved, precision="highest")
            soft.append(top + jnp.log(total + 1e-30) / sharpness)
        return _total(
            layers, new, soft, lambda v, axis: logsumexp(sharpness * v, axis) / sharpness
        )

    return function


def _largest(v: jax.Array, axis: Any) -> jax.Array:
    return jnp.max(v, axis=axis)


def _total(
    layers: Sequence[NoisyLayers],
    x: jax.Array,
    tops: list[jax.Array],
    maximum: Callable[..., jax.Array],
) -> jax.Array:
    """The log of the sum over layers of the noise of weights and of inputs."""
    terms = []
    for layer, top in zip(layers, tops, strict=True):
        ins, outs = log_scales(x, layer.inputs), log_scales(x, layer.outputs)
        reads = logsumexp(layer.power - 2 * ins, axis=2)  # (layers, groups)
        if layer.per_channel:
            makes = logsumexp(layer.share + 2 * top, axis=2)
            weights = logsumexp(makes + reads, axis=1)
        else:
            makes = logsumexp(layer.share + 2 * outs, axis=2)
            step = maximum(top - outs, axis=(1, 2))
            weights = logsumexp(makes + reads, axis=1) + 2 * step
        reach = jnp.logaddexp(
            maximum(layer.high - ins, axis=(1, 2)), maximum(layer.low - ins, axis=(1, 2))
        )
        inputs = logsumexp(layer.cost + 2 * ins, axis=(1, 2)) + 2 * reach
        terms += [layer.weight_step + weights, layer.input_step + inputs]
    return logsumexp(jnp.concatenate(terms))
