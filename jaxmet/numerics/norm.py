r"""A batch norm as the affine map that it is: $y = (x-\mu)\,g + \beta$.

Its gain can move into the layer before it or behind it. What is left is the identity and
a shift, with statistics that still are those of what it now reads.

Ioffe and Szegedy, [Batch Normalization](https://arxiv.org/abs/1502.03167), ICML 2015,
section 3.1; Jacob et al., [Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018, section 3.2.
"""

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

Channels: TypeAlias = Float[Array, "*channels"]


def norm_gain(variance: Channels, scale: Channels | None, epsilon: float) -> Channels:
    r"""$g = \gamma/\sqrt{\sigma^2+\varepsilon}$, with $\gamma = 1$ if there is no scale.

    A true root and a division: with a reciprocal root the gain of a norm that was folded
    before would not be exactly one.
    """
    root = jnp.sqrt(variance + epsilon)
    return (jnp.ones_like(root) if scale is None else scale) / root


def unit_scale(variance: Channels, epsilon: float) -> Channels:
    r"""The scale with which the gain is one: $\gamma = \sqrt{\sigma^2+\varepsilon}$."""
    return jnp.sqrt(variance + epsilon)


def folded_statistics(
    mean: Channels, variance: Channels, gain: Channels
) -> tuple[Channels, Channels]:
    r"""Mean and variance of $g\,x$ from those of $x$: $\mu g$ and $\sigma^2 g^2$."""
    return mean * gain, variance * (gain * gain)
