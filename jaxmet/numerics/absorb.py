r"""What a rectifier never takes away, moved after it.

Where $z \ge c$, relu(z) = relu(z − c) + c: a channel whose values lie far above zero may
give a constant to the next layer, and then has a smaller range.

Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, section 4.1.3.
"""

from jaxtyping import Float

from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array


def absorbed(
    mean: Float[Array, " channels"],
    variance: Float[Array, " channels"],
    upper: Float[Array, " channels"],
    n_sigma: float,
) -> Float[Array, " channels"]:
    r"""$c = \max(0, \mu - n\sigma)$, no more than the upper bound of the rectifier.

    With $n = 3$ a normal value is above $c$ in 99.865 % of cases.

    Args:
        mean: the mean of each channel before the rectifier.
        variance: its variance.
        upper: the upper bound of the rectifier, infinite where there is none.
        n_sigma: how many standard deviations below the mean are left.

    Returns:
        The constant of each channel, zero or more.
    """
    low = mean - n_sigma * xp.sqrt(variance)
    return xp.minimum(xp.maximum(low, 0.0), upper)


def shift_after(
    weight: Float[Array, "groups ins outs window"], c: Float[Array, " inputs"]
) -> Float[Array, " outputs"]:
    r"""$\sum W c$ over inputs and window: what outputs lose when inputs lose $c$.

    Args:
        weight: the weight of the layer after the rectifier.
        c: the constant of each of its inputs.

    Returns:
        What each output loses.
    """
    by_group = c.reshape(weight.shape[:2])
    return xp.einsum("giow,gi->go", weight, by_group).reshape(-1)
