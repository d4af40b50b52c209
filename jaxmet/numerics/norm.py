r"""A batch norm as the affine map that it is: $y = (x-\mu)\,g + \beta$.

Its gain can move into the layer before it or after it. What is left is the identity
and a shift, with statistics that still are those of what it now reads.

Ioffe and Szegedy, [Batch Normalization](https://arxiv.org/abs/1502.03167), ICML 2015,
section 3.1; Jacob et al., [Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018,
section 3.2.
"""

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array

SMALLEST = 1e-30
"""A variance plus epsilon below this is not divided by, nor a gain below it moved."""

FAINT = 2.0**-20
"""A scale this much smaller than its bias is not divided by: it is lost beside it."""

Channels: TypeAlias = Float[Array, "..."]
Weight: TypeAlias = Float[Array, "..."] | float


class Moved(NamedTuple):
    """A norm whose gain has moved, and the factor for the layer that it moved into.

    `scale` is None if the norm has none; `kept` are the channels that keep their gain.
    """

    factor: Channels
    mean: Channels
    variance: Channels
    scale: Channels | None
    bias: Channels
    kept: Bool[Array, "..."]


def norm_gain(variance: Channels, scale: Channels | None, epsilon: float) -> Channels:
    r"""$g = \gamma/\sqrt{\sigma^2+\varepsilon}$, where $\gamma = 1$ without a scale.

    A true root and a division: with a reciprocal root the gain of a norm that was
    folded before would not be exactly one.

    Args:
        variance: the variance of each channel.
        scale: the gain γ; None: 1.
        epsilon: what is added to the variance.

    Returns:
        The factor g of each channel.
    """
    root = unit_scale(variance, epsilon)
    return (xp.ones_like(root) if scale is None else scale) / root


def unit_scale(variance: Channels, epsilon: float) -> Channels:
    r"""The scale with which the gain is one: $\gamma = \sqrt{\sigma^2+\varepsilon}$.

    Args:
        variance: the variance of each channel.
        epsilon: what is added to it.

    Returns:
        The scale of each channel.
    """
    return xp.sqrt(variance + epsilon)


def folded_statistics(
    mean: Channels, variance: Channels, gain: Channels
) -> tuple[Channels, Channels]:
    r"""Mean and variance of $g\,x$ from those of $x$: $\mu g$ and $\sigma^2 g^2$.

    Args:
        mean: the mean of each channel.
        variance: its variance.
        gain: the factor g of each channel.

    Returns:
        The new mean and variance.
    """
    return mean * gain, variance * (gain * gain)


def gain_before(
    mean: Channels,
    variance: Channels,
    scale: Channels | None,
    bias: Channels,
    epsilon: float,
    *,
    stored: tuple[Any, Any],
    weight: Weight = 1.0,
) -> Moved:
    r"""Move the gain into what makes $x$: $y = (g x - \mu g) + \beta$.

    The statistics follow their tensor: $\mu' = \mu g$, $\sigma'^2 = \sigma^2 g^2$,
    $\gamma' = \sqrt{\sigma'^2+\varepsilon}$, $\beta' = \beta$. Without a scale only
    $\sigma'^2 = 1-\varepsilon$ gives a gain of one. `stored` are the dtypes that hold
    variance and scale: the factor makes up for what they round off. `weight` is what the
    norm multiplies both of its statistics by before it uses them.

    Args:
        mean: the stored mean of each channel.
        variance: the stored variance.
        scale: the gain γ; None: 1.
        bias: the shift β.
        epsilon: what is added to the variance.
        stored: the dtypes that hold variance and scale.
        weight: what the norm multiplies both of its statistics by; default 1.0.

    Returns:
        The new statistics, and the factor for the layer before.
    """
    gain = norm_gain(variance * weight, scale, epsilon)
    _, spread = folded_statistics(mean, variance, gain)
    if scale is None:
        spread = xp.full_like(spread, (1 - epsilon) / weight)
    spread, unit = _unit(spread, scale, epsilon, stored, weight)
    factor = _factor(gain, spread * weight, unit, epsilon, stored)
    can = xp.isfinite(factor) & xp.isfinite(mean * factor) & xp.isfinite(spread)
    can &= spread * weight + epsilon >= SMALLEST
    moves = can & ~is_one(gain, stored)
    return Moved(
        xp.where(moves, factor, 1.0),
        xp.where(moves, mean * factor, mean),
        xp.where(moves, spread, variance),
        None if scale is None or unit is None else xp.where(moves, unit, scale),
        bias,
        ~can,
    )


def gain_after(
    mean: Channels,
    variance: Channels,
    scale: Channels,
    bias: Channels,
    epsilon: float,
    *,
    stored: tuple[Any, Any],
    weight: Weight = 1.0,
) -> Moved:
    r"""Move the gain into what reads $y$: $y = g\,((x - \mu) + \beta/g)$.

    The statistics stay, since $x$ does: $\gamma' = \sqrt{\sigma^2+\varepsilon}$ and
    $\beta' = \beta/g$. What pads $y$ with zeros pads $y/g$ with zeros too.

    Args:
        mean: the stored mean of each channel.
        variance: the stored variance.
        scale: the gain γ; of its own.
        bias: the shift β.
        epsilon: what is added to the variance.
        stored: the dtypes that hold variance and scale.
        weight: what the norm multiplies both of its statistics by; default 1.0.

    Returns:
        The new statistics, and the factor for the layers after.
    """
    gain = norm_gain(variance * weight, scale, epsilon)
    _, unit = _unit(variance, scale, epsilon, stored, weight)
    factor = _factor(gain, variance * weight, unit, epsilon, stored)
    shift = bias / xp.where(factor == 0, 1.0, factor)
    can = xp.isfinite(factor) & xp.isfinite(shift) & (xp.abs(factor) >= SMALLEST)
    can &= variance * weight + epsilon >= SMALLEST
    can &= xp.abs(scale) > FAINT * xp.abs(bias)
    moves = can & ~is_one(gain, stored)
    return Moved(
        xp.where(moves, factor, 1.0),
        mean,
        variance,
        None if unit is None else xp.where(moves, unit, scale),
        xp.where(moves, shift, bias),
        ~can,
    )


def _unit(
    variance: Channels,
    scale: Channels | None,
    epsilon: float,
    stored: tuple[Any, Any],
    weight: Weight,
) -> tuple[Channels, Channels | None]:
    """A variance and the scale that makes its gain one, both as they will be stored."""
    variance = variance.astype(stored[0]).astype(variance.dtype)
    if scale is None:
        return variance, None
    unit = unit_scale(variance * weight, epsilon)
    return variance, unit.astype(stored[1]).astype(scale.dtype)


def _factor(
    gain: Channels,
    variance: Channels,
    scale: Channels | None,
    epsilon: float,
    stored: tuple[Any, Any],
) -> Channels:
    """The part of a gain that the norm does not have any more."""
    if all(dtype == gain.dtype for dtype in stored):
        return gain
    return gain / norm_gain(variance, scale, epsilon)


def is_one(gain: Channels, stored: tuple[Any, Any]) -> Bool[Array, "..."]:
    """Whether a gain is one but for rounding, as it is when it has moved before.

    Args:
        gain: gains, a float array of any shape.
        stored: the two dtypes in which what they come from is stored.

    Returns:
        A boolean array of the shape of `gain`.
    """
    last = max(float(jnp.finfo(dtype).eps) for dtype in stored)
    return xp.abs(gain - 1.0) <= max(4 * float(jnp.finfo(gain.dtype).eps), last)
