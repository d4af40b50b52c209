r"""The range that serves values best on a grid of few bits: percentile, MSE, SQNR, entropy.

A wide range makes every step coarse, a narrow one clips: each method is a price for the
two. All take the distribution as `Values` and never give up zero, nor the side on which
there is nothing: what is not negative keeps its end at zero.

The expected squared error of values spread evenly over $a \dots b$ is exact, not that of
the middle: with $t = x/\Delta$ and $f = t - \mathrm{round}(t)$,
$\int (x - \hat x)^2\,dx = \Delta^3\,[\mathrm{round}(t)/12 + f^3/3]$ where nothing is
clipped and $(x - h)^3/3$ beyond an end $h$ of the grid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

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

RangeMethod: TypeAlias = Literal["minmax", "percentile", "mse", "sqnr", "entropy"]
CALIBRATORS = get_args(RangeMethod)
GAMMA = 3.0
"""What AIMET lets clipping cost, where rounding costs 1."""


def is_percentile(value: Any) -> bool:
    """Whether a share of the values, in percent, leaves something between two ends."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 50 < value <= 100


Scalar = Float[Array, ""]
Objective = Callable[[Scalar, Scalar], Scalar]  # of a scale and a zero point


class Values(NamedTuple):
    """A distribution in sorted pieces, each spread evenly over `left` … `right`.

    A piece without width is one value. Of its `number` values `rounded` are not exactly
    zero: those that are cost nothing on any grid.
    """

    left: Float[Array, "*layers pieces"]
    right: Float[Array, "*layers pieces"]
    number: Float[Array, "*layers pieces"]
    rounded: Float[Array, "*layers pieces"]


def values_of(h: Histogram) -> Values:
    """A histogram as pieces, cut at the ends of the data: a constant has no width."""
    ends = jnp.clip(h.edges, h.low[..., None], h.high[..., None])
    at_zero = h.edges[..., :-1] == 0
    rounded = h.counts - jnp.where(at_zero, h.zeros[..., None], 0.0)
    return Values(ends[..., :-1], ends[..., 1:], h.counts, jnp.maximum(rounded, 0.0))


def values_in(x: Float[Array, "n"], method: str) -> Values:
    """Few values stand for themselves; many, and all for entropy, by their histogram."""
    if x.size > BINS or method == "entropy":
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
    method: str,
    symmetric: bool,
) -> Extremes:
    """The range for a grid with the ends low … high, for each of the leading axes.

    `tail` is the share that 'percentile' cuts off on either side.
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
    method: str,
    symmetric: bool,
    percentile: float | int = 99.99,
    axis: tuple[int, ...] | None = None,
    block: int | None = None,
    block_axis: int | None = None,
) -> Extremes:
    """The range of an array by a method, apart for each channel or block as `minmax`.

    low … high are the ends of the grid that it is for.
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
    groups: jax.Array, *given: jax.Array, method: str, symmetric: bool
) -> Extremes:
    values = jax.vmap(partial(values_in, method=method))(groups)
    given = tuple(jnp.broadcast_to(v, groups.shape[:1]) for v in given)
    return best_range(values, *given, method=method, symmetric=symmetric)


def _best_range(*args: jax.Array, method: str, symmetric: bool) -> Extremes:
    values, (low, high, tail) = Values(*args[:4]), args[4:]
    # In units of a power of two: squares of extreme values would leave the floats.
    extent = jnp.maximum(jnp.abs(values.left[0]), jnp.abs(values.right[-1]))
    _, exponent = jnp.frexp(extent)
    unit = jnp.ldexp(jnp.ones_like(extent), jnp.clip(exponent, -120, 120))
    left, right = values.left / unit, values.right / unit
    values = values._replace(left=left, right=right)
    ends = low, high
    whole = jnp.minimum(left[0], 0.0), jnp.maximum(right[-1], 0.0)
    if method == "percentile":
        least, most = percentile_range(values, tail)
    elif method == "sqnr":
        price = partial(_noise, values, ends, GAMMA)
        ranges = sqnr_candidates(*whole, ends, symmetric)
        best = _cheapest(price, ranges, ends, symmetric)
        least, most = ranges[0][best], ranges[1][best]
    else:
        price = partial(_noise, values, ends, 1.0)
        if method == "entropy":
            price = partial(divergence, values, ends)
        least, most = _search(price, *whole, ends, symmetric)
    return least * unit, most * unit


# Percentile


def percentile_range(values: Values, tail: Scalar) -> Extremes:
    """The range with a share of at most `tail` of all values beyond either end."""
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


def noise(
    values: Values, scale: Scalar, zero_point: Scalar, ends: Ends
) -> tuple[Scalar, Scalar]:
    """Mean squared error of values on a grid, inside it by rounding and by clipping."""
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


def divergence(values: Values, ends: Ends, scale: Scalar, zero_point: Scalar) -> Scalar:
    r"""What the grid loses of a histogram: $\sum P \log P/Q$.

    $P$ is the histogram of what is not zero, with what is clipped in the outermost bins
    that are not; $Q$ is that without what is clipped, each step's share spread evenly over
    its bins that hold anything. An empty bin of $Q$ counts as 10⁻⁴ of $P$. A step narrower
    than a bin would seem to lose nothing: infinity.

    Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017.
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
    price: Objective, ranges: tuple[jax.Array, jax.Array], ends: Ends, symmetric: bool
) -> jax.Array:
    """The first of the cheapest ranges, each priced with the grid that it would get."""

    def priced(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        return price(*grid_between(*candidate, *ends, symmetric=symmetric))

    return jnp.argmin(lax.map(priced, ranges))


def _search(
    price: Objective, least: Scalar, most: Scalar, ends: Ends, symmetric: bool
) -> Extremes:
    """The cheapest range within one that includes zero; equals leave it whole.

    A coarse net of shares of either end, from 1 down in equal ratios, then two finer ones
    around the best. A symmetric grid has one share for both ends.
    """
    coarse = np.arange(33 if symmetric else 13)
    one, two = (coarse, coarse) if symmetric else _pairs(coarse)
    one, two = (jnp.asarray(n, least.dtype) for n in (one, two))
    middle, finer = (16, 0.075) if symmetric else (6, 0.2)

    def narrowed(point: tuple[jax.Array, ...], _: Any) -> tuple[Any, None]:
        down, up, step, start = point
        down = jnp.minimum(down - step * (one - start), 0.0)
        up = jnp.minimum(up - step * (two - start), 0.0)
        ranges = jnp.exp2(down) * least, jnp.exp2(up) * most
        best = _cheapest(price, ranges, ends, symmetric)
        return (down[best], up[best], step * finer, jnp.full_like(start, middle)), None

    zero = jnp.zeros_like(least)  # shares are kept as logarithms
    begin = (zero, zero, zero + (0.3 if symmetric else 0.5), zero)
    (down, up, *_), _ = lax.scan(narrowed, begin, length=3)
    return jnp.exp2(down) * least, jnp.exp2(up) * most


def _pairs(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(steps, steps.size), np.tile(steps, steps.size)
