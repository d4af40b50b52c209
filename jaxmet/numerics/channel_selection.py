r"""Which input channels a layer can best do without, from products of its inputs alone.

The rows $x$ of a layer's inputs hold $k$ entries of each of $I$ channels, the channels
last: entry $t I + i$ is tap $t$ of channel $i$. With $G = E\,x^T x$ and $C = E\,x^T y$ the
best weights on a set S of channels are $W_S = G_{SS}^{-1} C_S$, and they leave
$E\,|y|^2 - \mathrm{tr}\,C_S^T W_S$: every choice is judged without the data.

All of it runs once, on numbers, and in NumPy: nothing is compiled.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from jaxmet.numerics.lasso import sparse
from jaxmet.numerics.least_squares import of_size_one, solve
from jaxmet.numerics.packed import rounded_size

DAMPING = 1e-5

Gram = Float[Array, "ins ins"]
Weight = Float[Array, "ins outs"]


class Reconstruction(NamedTuple):
    r"""The best weights on the channels left, and what they explain of each output.

    The error that is left is $E\,y^2$ less the `gain`.
    """

    weight: Float[Array, "ins outs"]
    gain: Float[Array, " outs"]


def by_magnitude(weight: Weight, channels: int) -> Float[Array, " {channels}"]:
    r"""$\sum W^2$ over the weights that read each channel.

    Args:
        weight: the weight, with the inputs of each channel side by side.
        channels: how many channels there are.

    Returns:
        One score per channel.
    """
    return np.sum(_split(weight, channels) ** 2, axis=(0, 2))


def by_block_obs(
    gram: Gram,
    cross: Weight,
    channels: int,
    *,
    damping: float = DAMPING,
) -> Float[Array, " {channels}"]:
    r"""By how much the error grows if a channel goes and all others make good for it.

    With $P = G^{-1}$, $W = P C$ and $P_{ii}$ the (k, k) block of channel i, it is
    $\mathrm{tr}\,W_i^T P_{ii}^{-1} W_i$.

    Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon,
    NIPS 1992; in blocks, Frantar and Alistarh, [Optimal Brain
    Compression](https://arxiv.org/abs/2208.11580), NeurIPS 2022, section 4.

    Args:
        gram: the Gram matrix of the inputs.
        cross: their products with the outputs that should stay.
        channels: how many channels there are.
        damping: what is added to the diagonal, as a share of it; default 1e-5.

    Returns:
        The growth of the squared error, one per channel.
    """
    inverse, weight = _inverse(gram, cross, channels, damping)
    return _losses(_diagonal(inverse, channels), _blocks(weight, channels))


def removal_order(
    gram: Gram,
    cross: Weight,
    channels: int,
    *,
    damping: float = DAMPING,
) -> Int[Array, " {channels}"]:
    r"""The channels in the order in which they go, each time the one least missed.

    Any number of them is a prefix. Beside the losses of `by_block_obs`, the inverse and the
    weights of what remains after channel i are exact by one block of elimination,
    $P \leftarrow P - P_{:i} P_{ii}^{-1} P_{i:}$ and
    $W \leftarrow W - P_{:i} P_{ii}^{-1} W_i$.

    Args:
        gram: the Gram matrix of the inputs.
        cross: their products with the outputs that should stay.
        channels: how many channels there are.
        damping: what is added to the diagonal, as a share of it; default 1e-5.

    Returns:
        The indices of all channels, the first to be removed first.
    """
    inverse, weight = _inverse(gram, cross, channels, damping)
    if not (np.isfinite(inverse).all() and np.isfinite(weight).all()):
        return np.arange(channels)
    taps = len(inverse) // channels
    weight, own = _blocks(weight, channels), _diagonal(inverse, channels)
    there, order = np.ones(channels, bool), np.zeros(channels, int)
    # The inverse now is `inverse - taken @ taken.T`: only columns of it are ever needed.
    taken = np.zeros_like(inverse)
    for step in range(channels):
        i = int(np.argmin(np.where(there, _losses(own, weight), np.inf)))
        here, gone = slice(i * taps, (i + 1) * taps), slice(step * taps)
        columns = inverse[:, here] - taken[:, gone] @ taken[here, gone].T
        block = own[i]
        pull = np.linalg.solve(block, weight[i])
        weight -= (columns @ pull).reshape(weight.shape)
        # block = L Lᵀ, and columns block⁻¹ columnsᵀ = new newᵀ
        new = np.linalg.solve(_lower(block), columns.T).T
        taken[:, step * taps : (step + 1) * taps] = new
        new = new.reshape(channels, taps, taps)
        own = own - new @ new.swapaxes(1, 2)
        own[i] = np.eye(
            taps
        )  # zero but for rounding; the block is one that can be inverted
        there[i], order[step] = False, i
    return order


def by_lasso(
    gram: Gram,
    cross: Weight,
    weight: Weight,
    channels: int,
    keep: int,
) -> Float[Array, " {channels}"]:
    r"""Scores whose `keep` largest are the channels that one factor each cannot replace.

    $\min_\beta \tfrac12 E\,|y - \sum_i \beta_i x_i W_i|^2 + \lambda |\beta|_1$ knows of the
    data only $A_{ij} = \mathrm{tr}\,W_i^T G_{ij} W_j$ and $b_i = \mathrm{tr}\,W_i^T C_i$.
    The penalty rises until no more than `keep` factors are left. These score above 1 by
    their size, and where they are fewer, magnitude picks the rest.

    He et al., [Channel Pruning for Accelerating Very Deep Neural
    Networks](https://arxiv.org/abs/1707.06168), ICCV 2017, section 3.1.

    Args:
        gram: the Gram matrix of the inputs.
        cross: their products with the outputs that should stay.
        weight: the weight.
        channels: how many channels there are.
        keep: how many of them stay.

    Returns:
        One score per channel; the `keep` largest are kept.
    """
    alike = weight @ weight.T
    blocks = (gram * alike).reshape(-1, channels, gram.shape[0] // channels, channels)
    reached = np.sum(_split(weight * cross, channels), axis=(0, 2))
    size = _positive(np.max(np.abs(reached)))
    form = np.sum(blocks, axis=(0, 2)) / size
    beta = np.abs(jax.device_get(sparse(*_filled_up(form, reached / size), keep)))
    beta, rest = beta[:channels], by_magnitude(weight, channels)
    rest = rest / _positive(2 * np.max(rest))
    return np.where(beta > 0, 1 + beta / _positive(np.max(beta)), rest)


def reconstruct(
    gram: Gram,
    cross: Weight,
    left: Bool[Array, " channels"],
    *,
    start: Weight | None = None,
    damping: float = DAMPING,
) -> Reconstruction:
    r"""The least squares weights on the channels S that are left, zero on the others.

    $W_S = W^0_S + (G_{SS} + \lambda D)^{-1} (C_S - G_{SS} W^0_S)$ with D the diagonal of
    $G_{SS}$: what few rows do not see stays as in `start`, which is zero if not given.

    He et al., [Channel Pruning for Accelerating Very Deep Neural
    Networks](https://arxiv.org/abs/1707.06168), ICCV 2017, section 3.1.

    Args:
        gram: the Gram matrix of the inputs.
        cross: their products with the outputs that should stay.
        left: True for each channel that stays.
        start: the weight until now; default None: zero.
        damping: how strongly `start` is kept where the inputs say little; default
            1e-5.

    Returns:
        The new weight, and what it explains of the energy of each output.
    """
    rows = np.flatnonzero(np.tile(left, len(gram) // left.size))
    inner: Any = gram[np.ix_(rows, rows)]
    right = cross[rows]
    kept: Any = np.zeros_like(right) if start is None else start[rows]
    kept = kept + solve(inner, right - inner @ kept, damping)
    gain = np.sum(kept * (2 * right - inner @ kept), axis=0)
    weight = np.zeros_like(cross)
    weight[rows] = kept
    return Reconstruction(weight, gain)


def _inverse(
    gram: Gram, cross: Weight, channels: int, damping: float
) -> tuple[Gram, Weight]:
    """The inverse and the best weights, the taps of a channel together, in float64.

    Both are those of inputs of size one, of which the losses are the same.
    """
    turn = np.arange(len(gram)).reshape(-1, channels).T.reshape(-1)
    # What rounding errors of the products need stays that of their own precision.
    damping = max(damping, len(gram) * float(np.finfo(gram.dtype).eps))
    gram, cross = gram.astype(np.float64), cross.astype(np.float64)
    turned: Any = gram[np.ix_(turn, turn)]
    unit, scale = of_size_one(turned)
    right: Any = np.hstack([np.eye(len(gram)), cross[turn] / scale])
    both = np.asarray(solve(unit, right, damping))
    inverse = both[:, : len(gram)]
    return (inverse + inverse.T) / 2, both[:, len(gram) :]


def _losses(
    own: Float[Array, "channels taps taps"], weight: Float[Array, "channels taps outs"]
) -> Float[Array, " channels"]:
    """What the error grows by without each channel."""
    if own.shape[1] == 1:  # a library's routine, called for each of thousands, is slow
        return np.einsum("cko,cko->c", weight, weight) / own[:, 0, 0]
    alike = weight @ weight.swapaxes(1, 2)
    return np.einsum("cij,cij->c", alike, np.linalg.inv(own))


def _lower(block: Float[Array, "taps taps"]) -> Float[Array, "taps taps"]:
    """L with L Lᵀ = the block; by eigenvalues, of which rounding errors make some negative."""
    try:
        return np.linalg.cholesky(block)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(block)
        least = np.finfo(values.dtype).tiny
        upper: Any = np.linalg.qr((vectors * np.sqrt(np.maximum(values, least))).T, "r")
        return upper.T


def _diagonal(inverse: Gram, channels: int) -> Float[Array, "channels taps taps"]:
    """The blocks of the channels on the diagonal."""
    taps = len(inverse) // channels
    blocks = inverse.reshape(channels, taps, channels, taps)
    return np.moveaxis(np.diagonal(blocks, axis1=0, axis2=2), -1, 0).copy()


def _blocks(weight: Weight, channels: int) -> Float[Array, "channels taps outs"]:
    return weight.reshape(channels, -1, weight.shape[1])


def _split(weight: Weight, channels: int) -> Float[Array, "taps channels outs"]:
    return weight.reshape(-1, channels, weight.shape[1])


def _filled_up(
    form: Float[Array, "n n"], linear: Float[Array, " n"]
) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """Both with zeros up to one of few sizes: as many programs; zeros have no coefficient."""
    more = rounded_size(len(linear)) - len(linear)
    return np.pad(form, (0, more)), np.pad(linear, (0, more))


def _positive(v: np.floating) -> np.floating:
    return v if v > 0 else v.dtype.type(1)
