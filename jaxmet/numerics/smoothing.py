r"""Scales that move the range of activations into the weights that read them.

A few channels of a transformer's activations are a hundred times as large as the others, and one
quantizer per tensor leaves the small ones nothing. Weights have no such channels. Where channels
are divided by a scale and the rows of the weight multiplied by it, the product stays.

Xiao et al., [SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models](https://arxiv.org/abs/2211.10438), ICML 2023.
"""

from collections.abc import Sequence

from jaxtyping import Float

from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array

MAX_SCALE = 1e5


def smoothing_scale(
    inputs: Float[Array, "*layers channels"],
    weights: Float[Array, "*layers channels"],
    alpha: float,
) -> Float[Array, "*layers channels"]:
    r"""$s_i \propto r_i^\alpha / w_i^{1-\alpha}$, with a geometric mean of 1 over the channels.

    With $\alpha = 1/2$ both sides get the range $\sqrt{r_i w_i}$, times a number that is the same
    for all channels. A channel that is zero on either side keeps $s_i = 1$, and no scale leaves
    $10^{-5} \ldots 10^5$.

    Args:
        inputs: the largest magnitude $r_i$ of each channel, a float array (*layers, channels).
        weights: the largest magnitude $w_i$ of what multiplies each channel.
        alpha: how much of the range moves, from 0 to 1.

    Returns:
        The scale that each channel is divided by.
    """
    alive = (inputs > 0) & (weights > 0)
    log_inputs, log_weights = (
        xp.log(xp.where(alive, v, 1.0)) for v in (inputs, weights)
    )
    log = alpha * log_inputs - (1 - alpha) * log_weights
    number = xp.sum(alive.astype(log.dtype), axis=-1, keepdims=True)
    mean = xp.sum(log, axis=-1, keepdims=True) / xp.maximum(number, 1.0)
    bound = float(xp.log(xp.asarray(MAX_SCALE)))
    return xp.exp(xp.clip(xp.where(alive, log - mean, 0.0), -bound, bound))


def smoothing_noise(
    scales: Float[Array, "*layers channels"],
    ranges: Sequence[Float[Array, "*layers"]],
    squares: Float[Array, "*layers channels"],
    weight: Float[Array, "*layers channels outs"],
    bits: int = 8,
) -> Float[Array, "*layers"]:
    r"""What rounding adds to the squared results of a product, with channels divided by scales.

    With steps $\Delta = \text{range} / (2^b - 1)$ of quantizers of whole values, and $\Delta_o =
    \max_i |s_i W_{io}| / (2^{b-1} - 1)$ of the outputs of the weight, it is

    $$\sum_\Delta \frac{\Delta^2}{12} \sum_i s_i^2 \sum_o W_{io}^2 + \sum_o
    \frac{\Delta_o^2}{12} \sum_i \frac{E[x_i^2]}{s_i^2}.$$

    Args:
        scales: what each channel is divided by, a float array (*layers, channels).
        ranges: of each quantizer that the divided values meet the range, (*layers).
        squares: the mean square of each channel before it is divided.
        weight: the weight before it is multiplied, (*layers, channels, outs).
        bits: of all quantizers; default 8.

    Returns:
        The squared error, a number for each layer.
    """
    energy = xp.sum(xp.square(weight), axis=-1)
    gain = xp.sum(xp.square(scales) * energy, axis=-1)
    steps = sum(xp.square(r / (2**bits - 1)) for r in ranges)
    largest = xp.max(xp.abs(weight) * scales[..., None], axis=-2)
    rounding = xp.sum(xp.square(largest / (2 ** (bits - 1) - 1)), axis=-1)
    entering = xp.sum(squares / xp.square(scales), axis=-1)
    return (steps * gain + rounding * entering) / 12
