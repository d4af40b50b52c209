r"""Mean, variance and range of values: measured, merged, and through activations.

The closed forms take a value to be normal, as the output of a batch norm nearly is.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.numerics.xp import Array

N_SIGMA = 4.0
"""How many standard deviations a normal value is taken to range on either side."""

Channels = Float[Array, "..."]


class Moments(NamedTuple):
    """What is known of each channel of a tensor."""

    mean: Channels
    variance: Channels
    low: Channels
    high: Channels

    @property
    def power(self) -> Channels:
        """The mean of the square."""
        return self.variance + self.mean * self.mean


class Measured(NamedTuple):
    """Moments of `number` values per channel; `spread` sums the squared distances to the mean."""

    number: Channels
    mean: Channels
    spread: Channels
    low: Channels
    high: Channels

    @property
    def moments(self) -> Moments:
        """Mean and variance, with the range."""
        count = xp.maximum(self.number, 1.0)
        return Moments(self.mean, self.spread / count, self.low, self.high)


def measure(
    x: Float[Array, "..."],
    kept: Sequence[int],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Measured:
    """Moments over all axes but the kept ones, flattened in their order.

    Only values `where` it is True count; a channel without any has mean 0 and the ends +∞
    and −∞.

    Args:
        x: the values, a float array of any shape.
        kept: the axes along which the channels run.
        where: a boolean array that broadcasts to the shape of `x`, True where a value counts;
            default None: all count.

    Returns:
        Count, mean, sum of squared distances and both ends of each channel, (channels,), at least
        in float32.
    """
    rows = _by_channel(x.astype(wide(x.dtype)), kept)
    if where is None:
        mean = xp.mean(rows, axis=1)
        spread = xp.sum(xp.square(rows - mean[:, None]), axis=1)
        count = xp.full_like(mean, rows.shape[1])
        return Measured(count, mean, spread, xp.min(rows, 1), xp.max(rows, 1))
    own = _by_channel(xp.broadcast_to(where, x.shape), kept)
    count = xp.sum(own, axis=1).astype(rows.dtype)
    mean = xp.sum(rows, axis=1, where=own) / xp.maximum(count, 1.0)
    spread = xp.sum(xp.square(rows - mean[:, None]), axis=1, where=own)
    low = xp.min(rows, axis=1, where=own, initial=xp.inf)
    return Measured(
        count, mean, spread, low, xp.max(rows, axis=1, where=own, initial=-xp.inf)
    )


def _by_channel(x: Array, kept: Sequence[int]) -> Array:
    """(channels, everything else)."""
    rest = [i for i in range(x.ndim) if i not in kept]
    x = xp.transpose(x, (*kept, *rest))
    x = x.reshape(*(x.shape[i] for i in range(len(kept))), -1)
    return x.reshape(-1, x.shape[-1])


def merge(one: Measured, two: Measured) -> Measured:
    r"""Moments of both sets of values: associative.

    $M = M_1 + M_2 + \delta^2 n_1 n_2 / n$ with $\delta$ the distance of the means. Chan,
    Golub and LeVeque, [Algorithms for Computing the Sample
    Variance](https://doi.org/10.1080/00031305.1983.10483115), 1983.

    Args:
        one: the moments of some values.
        two: those of others.

    Returns:
        The moments of all of them.
    """
    count = one.number + two.number
    share = two.number / xp.maximum(count, 1.0)
    apart = two.mean - one.mean
    return Measured(
        count,
        one.mean + apart * share,
        one.spread + two.spread + apart * apart * one.number * share,
        xp.minimum(one.low, two.low),
        xp.maximum(one.high, two.high),
    )


def normal(mean: Channels, variance: Channels, n_sigma: float = N_SIGMA) -> Moments:
    """A normal value and the range that it hardly ever leaves.

    Args:
        mean: the mean of each channel.
        variance: its variance.
        n_sigma: how many standard deviations the range is to either side; default 4.

    Returns:
        Mean, variance and range.
    """
    reach = n_sigma * xp.sqrt(variance)
    return Moments(mean, variance, mean - reach, mean + reach)


def clipped(x: Moments, lower: Channels, upper: Channels) -> Moments:
    r"""A normal value clipped to lower … upper, either of which may be infinite.

    With $\alpha, \beta$ the bounds in standard deviations from the mean and
    $p = \Phi(\beta) - \Phi(\alpha)$,
    $E y = a\Phi(\alpha) + b\Phi(-\beta) + \mu p + \sigma(\varphi(\alpha) - \varphi(\beta))$
    and $E y^2 = a^2\Phi(\alpha) + b^2\Phi(-\beta) + (\mu^2+\sigma^2) p
    + \sigma((\mu+a)\varphi(\alpha) - (\mu+b)\varphi(\beta))$.

    Args:
        x: the mean, variance and range of each channel.
        lower: the lower bound, −∞ for none.
        upper: the upper bound, ∞ for none.

    Returns:
        The moments after the clip.
    """
    sigma = xp.sqrt(xp.maximum(x.variance, 1e-30))
    alpha, beta = (lower - x.mean) / sigma, (upper - x.mean) / sigma
    a, b = _finite(lower), _finite(upper)
    # The difference of the smaller tails, which is exact where both bounds are far out.
    below, above = xp.normal_cdf(alpha), xp.normal_cdf(-beta)
    inside = xp.where(
        alpha > 0,
        xp.normal_cdf(-alpha) - above,
        xp.maximum(xp.normal_cdf(beta) - below, 0.0),
    )
    f, g = xp.normal_pdf(alpha), xp.normal_pdf(beta)
    mean = a * below + b * above + x.mean * inside + sigma * (f - g)
    power = a * a * below + b * b * above + x.power * inside
    power = power + sigma * ((x.mean + a) * f - (x.mean + b) * g)
    mean = xp.clip(mean, lower, upper)
    variance = xp.maximum(power - mean * mean, 0.0)
    low, high = (xp.clip(end, lower, upper) for end in (x.low, x.high))
    return Moments(mean, variance, low, high)


def leaky(x: Moments, slope: Channels) -> Moments:
    """x where it is positive, slope · x elsewhere: two rectified halves, never both.

    Args:
        x: the mean, variance and range of each channel.
        slope: the factor of negative values.

    Returns:
        The moments after the leaky ReLU.
    """
    zero, infinite = xp.zeros_like(x.mean), xp.full_like(x.mean, xp.inf)
    up, down = clipped(x, zero, infinite), clipped(x, -infinite, zero)
    mean = up.mean + slope * down.mean
    power = up.power + slope * slope * down.power
    ends = (up.low + slope * down.low, up.high + slope * down.high)
    variance = xp.maximum(power - mean * mean, 0.0)
    return Moments(mean, variance, xp.minimum(*ends), xp.maximum(*ends))


def through(x: Moments, function: Callable[[Array], Array]) -> Moments:
    r"""A normal value through any function of one number, by quadrature.

    $E f(\mu + \sigma t)$ by the trapezoidal rule over $|t| \le 8$, which gains digits
    geometrically for a smooth $f$ and stays good where $f$ has a kink, as hard-swish has:
    Gauss and Hermite's nodes are few there. Trefethen and Weideman, [The Exponentially
    Convergent Trapezoidal Rule](https://doi.org/10.1137/130932132), SIAM Review 56, 2014.
    Where $f$ is not finite beyond the range of $x$ it counts as at its nearer end.

    Args:
        x: the mean, variance and range of each channel.
        function: a function of one number, applied entry by entry.

    Returns:
        The moments after the function.
    """
    t = np.linspace(-8.0, 8.0, 1025)
    share = np.exp(-t * t / 2)
    at, weight = (
        xp.asarray(v, x.mean.dtype).reshape(-1, *[1] * x.mean.ndim)
        for v in (t, share / share.sum())
    )
    nodes = x.mean[None] + xp.sqrt(x.variance)[None] * at
    inside = function(xp.clip(nodes, x.low[None], x.high[None]))
    values = function(nodes)
    values = xp.where(xp.isfinite(values), values, inside)
    mean = xp.sum(weight * values, axis=0)
    variance = xp.sum(weight * xp.square(values - mean[None]), axis=0)
    return Moments(mean, variance, xp.min(inside, axis=0), xp.max(inside, axis=0))


def affine(x: Moments, scale: float, shift: float) -> Moments:
    """scale · x + shift.

    Args:
        x: the mean, variance and range of each channel.
        scale: the factor of the value.
        shift: what is added afterwards.

    Returns:
        The moments of the result.
    """
    ends = (x.low * scale + shift, x.high * scale + shift)
    low, high = xp.minimum(*ends), xp.maximum(*ends)
    return Moments(x.mean * scale + shift, x.variance * scale**2, low, high)


def added(one: Moments, two: Moments, n_sigma: float = N_SIGMA) -> Moments:
    """The sum of two values that know nothing of each other.

    Args:
        one: the moments of a value.
        two: those of another, independent of it.
        n_sigma: how many standard deviations the range is to either side; default 4.

    Returns:
        The moments of the sum.
    """
    total = normal(one.mean + two.mean, one.variance + two.variance, n_sigma)
    low = xp.maximum(total.low, one.low + two.low)
    return total._replace(low=low, high=xp.minimum(total.high, one.high + two.high))


def multiplied(one: Moments, two: Moments) -> Moments:
    """The product of two values that know nothing of each other.

    Args:
        one: the moments of a value.
        two: those of another, independent of it.

    Returns:
        The moments of the product.
    """
    variance = one.variance * two.power + two.variance * one.mean * one.mean
    ends = [a * b for a in (one.low, one.high) for b in (two.low, two.high)]
    ends = xp.stack(ends)
    return Moments(
        one.mean * two.mean, variance, xp.min(ends, axis=0), xp.max(ends, axis=0)
    )


def either(one: Moments, two: Moments) -> Moments:
    """A value that is one or the other as often.

    Args:
        one: the moments of a value.
        two: those of another, independent of it.

    Returns:
        The moments of the mixture.
    """
    mean = (one.mean + two.mean) / 2
    power = (one.power + two.power) / 2
    return Moments(
        mean,
        xp.maximum(power - mean * mean, 0.0),
        xp.minimum(one.low, two.low),
        xp.maximum(one.high, two.high),
    )


def _finite(bound: Array) -> Array:
    """The bound, or zero for an infinite one: what it multiplies vanishes there."""
    return xp.where(xp.isfinite(bound), bound, 0.0)
