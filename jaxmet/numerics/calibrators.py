r"""The range of values that a quantizer covers: min-max, percentile, MSE, SQNR, entropy.

A wide range makes every step coarse, a narrow one clips: each calibrator is a price for the
two. A calibrator is a function `(values, target) -> (low, high)` in `jax.numpy`: of a
histogram, as `Values`, and of the quantizer that the range is for, as `RangeTarget`, to two
numbers. The built-in ones are the entries of `CALIBRATORS`; any other function can be given
to `jm.QuantConfig` in their place:

    def three_sigma(values, target):
        middle, weight = (values.left + values.right) / 2, values.number / values.number.sum()
        mean = jnp.sum(weight * middle)
        deviation = jnp.sqrt(jnp.sum(weight * (middle - mean) ** 2))
        return mean - 3 * deviation, mean + 3 * deviation

    jm.QuantConfig(activation_range=three_sigma)

Whatever the range, the quantizer covers zero too. The built-in ones leave the end of the side
on which there is nothing at zero.

The expected squared error of values spread evenly over $a \dots b$ is exact, not that of
the middle: with $t = x/\Delta$ and $f = t - \mathrm{round}(t)$,
$\int (x - \hat x)^2\,dx = \Delta^3\,[\mathrm{round}(t)/12 + f^3/3]$ where nothing is
clipped and $(x - h)^3/3$ beyond an end $h$ of the grid.
"""

import functools
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxmet.numerics.histogram import BINS, Histogram, histogram
from jaxmet.numerics.ranges import (
    Ends,
    Extremes,
    Numbers,
    grid_between,
    groups_of,
    minmax,
    over_blocks,
)

RangeName: TypeAlias = Literal["minmax", "percentile", "mse", "sqnr", "entropy"]
GAMMA = 3.0
"""What AIMET lets clipping cost, where rounding costs 1."""


def is_percentile(value: Any) -> bool:
    """Whether a share of the values, in percent, leaves something between two ends.

    Args:
        value: anything; a number counts in percent of all values.

    Returns:
        True for a number above 50 and up to 100, no bool.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 50 < value <= 100


Scalar = Float[Array, ""]
Objective = Callable[[Scalar, Scalar], Scalar]  # of a scale and a zero point


class Values(NamedTuple):
    """A histogram: sorted bins, in each of which values lie evenly from `left` to `right`.

    A bin without width is one value: up to 2,048 values of a weight stand for themselves. Of
    the `number` of values in a bin `rounded` are not exactly zero: those that are cost nothing
    on any grid. The first left and the last right end are the smallest and largest value.
    """

    left: Float[Array, "*layers pieces"]
    right: Float[Array, "*layers pieces"]
    number: Float[Array, "*layers pieces"]
    rounded: Float[Array, "*layers pieces"]


class RangeTarget(NamedTuple):
    """What a range is for: the `lowest` and `highest` integer of the quantizer.

    `tail` is the share of the values that may lie beyond either end, from
    `QuantConfig.percentile`; `symmetric` is a plain bool.
    """

    lowest: Scalar
    highest: Scalar
    tail: Scalar
    symmetric: bool

    @property
    def ends(self) -> Ends:
        """The lowest and highest integer."""
        return self.lowest, self.highest


Calibrator: TypeAlias = Callable[[Values, RangeTarget], tuple[Any, Any]]
RangeMethod: TypeAlias = RangeName | Calibrator
C = TypeVar("C", bound=Calibrator)


def calibrator_of(method: RangeMethod) -> Calibrator:
    """The function of a name, or the function itself.

    Args:
        method: a name of `CALIBRATORS`, or a function `(values, target) -> (low, high)`.

    Returns:
        The function.

    Raises:
        KeyError: for a name that `CALIBRATORS` does not have.
    """
    return method if callable(method) else CALIBRATORS[method]


def check_calibrator(method: Any, caller: str, name: str) -> None:
    """Raise unless this is a name, or a function that runs on a histogram.

    Args:
        method: what was given as a calibrator.
        caller: the function that was called, for the message.
        name: the argument that holds it, for the message.

    Raises:
        ValueError: for an unknown name, for what is neither name nor function or has no hash, and
            for a function that does not run on a histogram.
    """
    if isinstance(method, str) and method in CALIBRATORS:
        return
    cure = (
        f"It is one of {', '.join(map(repr, CALIBRATORS))}, or a function "
        "(values, target) -> (low, high) in jax.numpy: see jm.numerics.calibrators."
    )
    if not callable(method) or not isinstance(method, Hashable):
        raise ValueError(f"jaxmet.{caller}: {name} is {method!r}. {cure}")
    pieces, scalar = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8,), ()))
    for symmetric in (True, False):
        run: Any = partial(_best_range, method=method, symmetric=symmetric)
        try:
            jax.eval_shape(run, *[pieces] * 4, *[scalar] * 3)
        except Exception as error:  # whatever a function raises that cannot run
            first = str(error).strip().split("\n")[0]
            raise ValueError(
                f"jaxmet.{caller}: {name}, the function {calibrator_name(method)}, does not "
                f"run on a histogram: {type(error).__name__}: {first} {cure}"
            ) from error


def calibrator_name(method: Any) -> str:
    """How a calibrator is shown.

    Args:
        method: a name or a function.

    Returns:
        The name, that of the function, or its `repr` if it has none.
    """
    return (
        method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    )


def values_of(h: Histogram) -> Values:
    """A histogram as pieces, cut at the ends of the data: a constant has no width.

    Args:
        h: a histogram; leading axes are histograms side by side.

    Returns:
        The bins as `Values`, float arrays (*layers, bins).
    """
    ends = jnp.clip(h.edges, h.low[..., None], h.high[..., None])
    at_zero = h.edges[..., :-1] == 0
    rounded = h.counts - jnp.where(at_zero, h.zeros[..., None], 0.0)
    return Values(ends[..., :-1], ends[..., 1:], h.counts, jnp.maximum(rounded, 0.0))


def values_in(x: Float[Array, "n"], method: RangeMethod) -> Values:
    """Few values stand for themselves; many, and all for a binned calibrator, by bins.

    Args:
        x: the values, a float array (n,).
        method: the calibrator that will read them, a name or a function.

    Returns:
        `Values`: one piece per value up to 2,048 values, else one piece per bin.
    """
    if x.size > BINS or getattr(calibrator_of(method), "binned", False):
        return values_of(histogram(x))
    x = jnp.sort(x)
    return Values(x, x, jnp.ones_like(x), (x != 0).astype(x.dtype))


@partial(jax.jit, static_argnames=("method", "symmetric"))
def best_range(
    values: Values,
    low: Float[Array, "*layers"],
    high: Float[Array, "*layers"],
    tail: Float[Array, "*layers"],
    *,
    method: RangeMethod,
    symmetric: bool,
) -> Extremes:
    """The range for a grid with the ends low … high, for each of the leading axes.

    `tail` is the share that 'percentile' cuts off on either side.

    Args:
        values: pieces of histograms, one per leading index.
        low: the lowest integer of each grid.
        high: the highest integer of each.
        tail: the share that 'percentile' cuts off on either side.
        method: a name such as 'mse', or a function.
        symmetric: whether zero is the middle of the grids.

    Returns:
        The lower and the upper ends.
    """
    choose = partial(_best_range, method=method, symmetric=symmetric)
    pieces = "(n),(n),(n),(n)"
    every = jnp.vectorize(choose, signature=f"{pieces},(),(),()->(),()")
    return every(*values, low, high, tail)


def range_of(
    x: Float[Array, "..."] | Float[np.ndarray, "..."],
    low: Numbers,
    high: Numbers,
    *,
    method: RangeMethod,
    symmetric: bool,
    percentile: float | int = 99.99,
    axis: tuple[int, ...] | None = None,
    block: int | None = None,
    block_axis: int | None = None,
) -> Extremes:
    """The range of an array by a method, apart for each channel or block as `minmax`.

    low … high are the ends of the grid that it is for.

    Args:
        x: the values, any shape.
        low: the lowest integer of the grid.
        high: the highest integer.
        method: a name such as 'mse', or a function.
        symmetric: whether zero is the middle of the grid.
        percentile: for 'percentile', the percent of values below the upper end; default 99.99.
        axis: the axes with ranges of their own; default None: one range.
        block: how many neighbours on `block_axis` share a range; default None.
        block_axis: the axis that is divided into blocks; default None.

    Returns:
        The lower and the upper ends, with the rank of `x`.
    """
    if method == "minmax":
        return minmax(x, axis, block=block, block_axis=block_axis)

    def of(x: jax.Array, block: int | None) -> Extremes:
        groups, shape = groups_of(x, axis, block=block, block_axis=block_axis)
        ends = (jnp.asarray(end, groups.dtype) for end in (low, high))
        tail = jnp.asarray(1 - percentile / 100, groups.dtype)
        found = _range_of(groups, *ends, tail, method=method, symmetric=symmetric)
        return found[0].reshape(shape), found[1].reshape(shape)

    return over_blocks(of, x, block, block_axis)


@partial(jax.jit, static_argnames=("method", "symmetric"))
def _range_of(
    groups: jax.Array, *given: jax.Array, method: RangeMethod, symmetric: bool
) -> Extremes:
    values = jax.vmap(partial(values_in, method=method))(groups)
    given = tuple(jnp.broadcast_to(v, groups.shape[:1]) for v in given)
    return best_range(values, *given, method=method, symmetric=symmetric)


def _best_range(*args: jax.Array, method: Any, symmetric: bool) -> Extremes:
    lowest, highest, tail = args[4:]
    values, target = Values(*args[:4]), RangeTarget(lowest, highest, tail, symmetric)
    found = calibrator_of(method)(values, target)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError("it returns no pair of a low and a high end.")
    low, high = (jnp.asarray(end, values.left.dtype) for end in found)
    if low.shape or high.shape:
        raise TypeError(
            f"the ends have the shapes {low.shape} and {high.shape}, not ()."
        )
    return low, high


def binned(calibrator: C) -> C:
    """Mark a calibrator that needs bins of one width, however few the values are.

    Args:
        calibrator: a function `(values, target) -> (low, high)`.

    Returns:
        The same function, marked.
    """
    setattr(calibrator, "binned", True)  # noqa: B010
    return calibrator


def _in_own_unit(calibrator: Calibrator) -> Calibrator:
    """In units of a power of two: squares of extreme values would leave the floats."""

    @functools.wraps(calibrator)
    def scaled(values: Values, target: RangeTarget) -> Extremes:
        extent = jnp.maximum(jnp.abs(values.left[0]), jnp.abs(values.right[-1]))
        _, exponent = jnp.frexp(extent)
        unit = jnp.ldexp(jnp.ones_like(extent), jnp.clip(exponent, -120, 120))
        left, right = values.left / unit, values.right / unit
        low, high = calibrator(values._replace(left=left, right=right), target)
        return low * unit, high * unit

    return scaled


def _whole(values: Values) -> Extremes:
    return jnp.minimum(values.left[0], 0.0), jnp.maximum(values.right[-1], 0.0)


def smallest_to_largest(values: Values, target: RangeTarget) -> Extremes:
    """'minmax': everything, however far out.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: not used.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    del target
    return _whole(values)


# Percentile


@_in_own_unit
def percentile(values: Values, target: RangeTarget) -> Extremes:
    """'percentile': what leaves a share `tail` of the values beyond either end.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: of which `tail` is used: the share beyond either end, from 0 to 0.5.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    return percentile_range(values, target.tail)


def percentile_range(values: Values, tail: Scalar) -> Extremes:
    """The range with a share of at most `tail` of all values beyond either end.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        tail: the share beyond either end, a scalar from 0 to 0.5.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    beyond = tail * jnp.sum(values.number)
    flipped = (-values.right[::-1], -values.left[::-1], values.number[::-1])
    return -_upper(*flipped, beyond), _upper(*values[:3], beyond)


def _upper(
    left: jax.Array, right: jax.Array, count: jax.Array, beyond: jax.Array
) -> jax.Array:
    """Where so many values lie above; summed from above, where it is to be exact."""
    above = jnp.cumsum(count[::-1])[::-1]
    at = jnp.maximum(jnp.sum(above > beyond) - 1, 0)
    share = (beyond - (above[at] - count[at])) / jnp.maximum(count[at], 1e-30)
    return right[at] - jnp.clip(share, 0.0, 1.0) * (right[at] - left[at])


# Squared error: MSE and SQNR


@_in_own_unit
def mse(values: Values, target: RangeTarget) -> Extremes:
    """'mse': where the mean squared error is least.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    return _search(partial(_noise, values, target.ends, 1.0), *_whole(values), target)


@_in_own_unit
def sqnr(values: Values, target: RangeTarget) -> Extremes:
    """'sqnr': the best of AIMET's candidates, with clipping weighted three times.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    price = partial(_noise, values, target.ends, GAMMA)
    ranges = sqnr_candidates(*_whole(values), target.ends, target.symmetric)
    best = _cheapest(price, ranges, target)
    return ranges[0][best], ranges[1][best]


def noise(
    values: Values, scale: Scalar, zero_point: Scalar, ends: Ends
) -> tuple[Scalar, Scalar]:
    """Mean squared error of values on a grid, inside it by rounding and by clipping.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        scale: the step of the grid, a positive scalar.
        zero_point: the integer that stands for zero, a scalar.
        ends: the lowest and the highest integer.

    Returns:
        Two scalars: the mean squared error of what lies inside the grid, and that of what is
        clipped.
    """
    least, most = (scale * (end - zero_point) for end in ends)
    a, b = values.left, values.right
    wide = b > a
    density = jnp.where(wide, 1.0 / jnp.where(wide, b - a, 1.0), 0.0)

    def beyond(u: jax.Array, v: jax.Array) -> jax.Array:
        share = jnp.where(wide, (v - u) * density, 1.0)
        return share * (u * u + u * v + v * v) / 3

    clipped = beyond(jnp.maximum(a - most, 0.0), jnp.maximum(b - most, 0.0))
    clipped += beyond(jnp.maximum(least - b, 0.0), jnp.maximum(least - a, 0.0))
    s, t = (jnp.clip(end, least, most) * (1.0 / scale) for end in (a, b))
    m, n = jnp.round(s), jnp.round(t)
    f, g = s - m, t - n
    share = jnp.where(wide, (t - s) * scale * density, 1.0)
    within = share * (f * f + f * g + g * g) / 3
    across = ((n - m) / 12 + (g * g * g - f * f * f) / 3) * scale * density
    inside = scale * scale * jnp.where(m == n, within, across)
    weight = values.rounded / jnp.maximum(jnp.sum(values.number), 1.0)
    return jnp.sum(weight * inside), jnp.sum(weight * clipped)


def _noise(
    values: Values, ends: Ends, gamma: float, scale: Scalar, zero_point: Scalar
) -> Scalar:
    rounding, clipping = noise(values, scale, zero_point, ends)
    return rounding + gamma * clipping


def sqnr_candidates(
    least: Scalar, most: Scalar, ends: Ends, symmetric: bool
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    r"""The ranges among which AIMET's `tf_enhanced` chooses, with clipping at $\gamma = 3$.

    Symmetric, 101 steps $k/100$ of the one that covers everything. Asymmetric, the steps
    $k/16$, $k = 1 \dots 17$, of the one that covers everything, each at 21 offsets, cut to
    the observed range (one wider on both sides is no candidate and repeats the observed
    range), and that itself: 358.

    Args:
        least: the smallest value, a scalar.
        most: the largest value, a scalar.
        ends: the lowest and the highest integer.
        symmetric: whether the grid has no zero point.

    Returns:
        The lower and the upper ends of the candidates, (101,) or (358,) each.
    """
    if symmetric:
        # From wide to narrow: of equals the widest wins.
        shares = jnp.asarray(np.arange(101, 0, -1) / 100, least.dtype)
        return shares * least, shares * most
    steps = ends[1] - ends[0]
    observed, _ = grid_between(least, most, *ends, symmetric=False)
    step = observed * jnp.asarray(np.arange(17, 0, -1) / 16, least.dtype).reshape(-1, 1)
    offset = -steps + jnp.round(steps * jnp.arange(21, dtype=least.dtype) / 20)
    low = (step * offset.reshape(1, -1)).reshape(-1)
    high = low + steps * jnp.repeat(step.reshape(-1), 21)
    wider = (low < least) & (high > most)
    low = jnp.where(wider, least, jnp.maximum(low, least))
    high = jnp.where(wider, most, jnp.minimum(high, most))
    empty = high <= low
    low, high = jnp.where(empty, least, low), jnp.where(empty, most, high)
    return jnp.append(least, low), jnp.append(most, high)


# Entropy


@binned
@_in_own_unit
def entropy(values: Values, target: RangeTarget) -> Extremes:
    """'entropy': where the histogram changes least.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.
        target: the quantizer that the range is for: its ends, and whether it is symmetric.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    price = partial(divergence, values, target.ends)
    return _search(price, *_whole(values), target)


def divergence(values: Values, ends: Ends, scale: Scalar, zero_point: Scalar) -> Scalar:
    r"""What the grid loses of a histogram: $\sum P \log P/Q$.

    $P$ is the histogram of what is not zero, with what is clipped in the outermost bins
    that are not; $Q$ is that without what is clipped, each step's share spread evenly over
    its bins that hold anything. An empty bin of $Q$ counts as 10⁻⁴ of $P$. A step narrower
    than a bin would seem to lose nothing: infinity.

    Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017.

    Args:
        values: the histogram as `Values`, in bins of one width.
        ends: the lowest and the highest integer.
        scale: the step of the grid, a positive scalar.
        zero_point: the integer that stands for zero, a scalar.

    Returns:
        The divergence in nats, a scalar; infinity for a step narrower than a bin.
    """
    count = values.rounded
    level = jnp.round((values.left + values.right) / 2 / scale) + zero_point
    inside = (level >= ends[0]) & (level <= ends[1])
    kept = jnp.where(inside, count, 0.0)
    pieces = jnp.arange(count.size)
    first, last = jnp.argmax(inside), count.size - 1 - jnp.argmax(inside[::-1])
    p = kept.at[first].add(jnp.sum(jnp.where(level < ends[0], count, 0.0)))
    p = p.at[last].add(jnp.sum(jnp.where(level > ends[1], count, 0.0)))
    step = jnp.cumsum(jnp.diff(level, prepend=level[:1]) != 0)
    sums = partial(jax.ops.segment_sum, segment_ids=step, num_segments=pieces.size)
    held = sums((kept > 0).astype(count.dtype))
    q = jnp.where(kept > 0, sums(kept)[step] / jnp.maximum(held[step], 1.0), 0.0)
    p = p / jnp.maximum(jnp.sum(p), 1e-30)
    q = jnp.maximum(q / jnp.maximum(jnp.sum(q), 1e-30), 1e-4 * p)
    loss = jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.where(p > 0, q, 1.0)), 0.0))
    return jnp.where(scale < jnp.max(values.right - values.left), jnp.inf, loss)


# Search


def _cheapest(
    price: Objective, ranges: tuple[jax.Array, jax.Array], target: RangeTarget
) -> jax.Array:
    """The first of the cheapest ranges, each priced with the grid that it would get."""

    def priced(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        grid = grid_between(*candidate, *target.ends, symmetric=target.symmetric)
        return price(*grid)

    return jnp.argmin(lax.map(priced, ranges))


def _search(
    price: Objective, least: Scalar, most: Scalar, target: RangeTarget
) -> Extremes:
    """The cheapest range within one that includes zero; equals leave it whole.

    A coarse net of shares of either end, from 1 down in equal ratios, then two finer ones
    around the best. A symmetric grid has one share for both ends.
    """
    symmetric = target.symmetric
    coarse = np.arange(33 if symmetric else 13)
    one, two = (coarse, coarse) if symmetric else _pairs(coarse)
    one, two = (jnp.asarray(n, least.dtype) for n in (one, two))
    middle, finer = (16, 0.075) if symmetric else (6, 0.2)

    def narrowed(point: tuple[jax.Array, ...], _: Any) -> tuple[Any, None]:
        down, up, step, start = point
        down = jnp.minimum(down - step * (one - start), 0.0)
        up = jnp.minimum(up - step * (two - start), 0.0)
        ranges = jnp.exp2(down) * least, jnp.exp2(up) * most
        best = _cheapest(price, ranges, target)
        return (down[best], up[best], step * finer, jnp.full_like(start, middle)), None

    zero = jnp.zeros_like(least)  # shares are kept as logarithms
    begin = (zero, zero, zero + (0.3 if symmetric else 0.5), zero)
    (down, up, *_), _ = lax.scan(narrowed, begin, length=3)
    return jnp.exp2(down) * least, jnp.exp2(up) * most


def _pairs(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(steps, steps.size), np.tile(steps, steps.size)


CALIBRATORS: dict[RangeName, Calibrator] = {
    "minmax": smallest_to_largest,
    "percentile": percentile,
    "mse": mse,
    "sqnr": sqnr,
    "entropy": entropy,
}
"""The built-in calibrators; a new one is a function, an entry here and in `RangeName`."""
