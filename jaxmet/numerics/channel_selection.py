r"""Which input channels a layer can best do without, from products of its inputs alone.

The rows $x$ of a layer's inputs hold $k$ entries of each of $I$ channels, the channels
last: entry $t I + i$ is tap $t$ of channel $i$. With $G = E\,x^T x$ and $C = E\,x^T y$ the
best weights on a set S of channels are $W_S = G_{SS}^{-1} C_S$, and they leave
$E\,|y|^2 - \mathrm{tr}\,C_S^T W_S$: every choice is judged without the data.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmet.numerics.lasso import sparse
from jaxmet.numerics.least_squares import of_size_one, solve

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
    return jnp.sum(_split(weight, channels) ** 2, axis=(0, 2))


@partial(jax.jit, static_argnames="channels")
def by_block_obs(
    gram: Gram,
    cross: Weight,
    channels: int,
    *,
    damping: float | Float[Array, ""] = DAMPING,
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
    return _losses(_table(gram, cross, channels, damping), channels)


@partial(jax.jit, static_argnames="channels")
def removal_order(
    gram: Gram,
    cross: Weight,
    channels: int,
    *,
    damping: float | Float[Array, ""] = DAMPING,
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
    table = _table(gram, cross, channels, damping)
    taps = table.shape[0] // channels
    identity = jnp.eye(taps, dtype=table.dtype)
    product = partial(jnp.matmul, precision="highest")

    def remove(step: jax.Array, state: tuple) -> tuple:
        table, there, order = state
        i = jnp.argmin(jnp.where(there, _losses(table, channels), jnp.inf))
        cut = lambda v, axis: lax.dynamic_slice_in_dim(v, i * taps, taps, axis)
        put = lambda v, u, axis: lax.dynamic_update_slice_in_dim(v, u, i * taps, axis)
        rows, columns = cut(table, 0), cut(table, 1)
        pull = product(_inverses(cut(rows, 1)[None])[0], rows)
        table = table - product(columns, pull)
        # Zero but for rounding; the block is one that can be inverted.
        table = put(table, jnp.zeros_like(columns), 1)
        table = put(table, put(jnp.zeros_like(rows), identity, 1), 0)
        return table, there.at[i].set(False), order.at[step].set(i.astype(order.dtype))

    state = (table, jnp.ones(channels, bool), jnp.zeros(channels, jnp.int32))
    return lax.fori_loop(0, channels, remove, state)[2]


@partial(jax.jit, static_argnames="channels")
def by_lasso(
    gram: Gram,
    cross: Weight,
    weight: Weight,
    channels: int,
    keep: int | Int[Array, ""],
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
    alike = jnp.matmul(weight, weight.T, precision="highest")
    blocks = (gram * alike).reshape(-1, channels, gram.shape[0] // channels, channels)
    reached = jnp.sum(_split(weight * cross, channels), axis=(0, 2))
    size = _positive(jnp.max(jnp.abs(reached)))
    beta = jnp.abs(sparse(jnp.sum(blocks, axis=(0, 2)) / size, reached / size, keep))
    rest = by_magnitude(weight, channels)
    rest = rest / _positive(2 * jnp.max(rest))
    return jnp.where(beta > 0, 1 + beta / _positive(jnp.max(beta)), rest)


@jax.jit
def reconstruct(
    gram: Gram,
    cross: Weight,
    left: Bool[Array, " channels"],
    *,
    start: Weight | None = None,
    damping: float | Float[Array, ""] = DAMPING,
) -> Reconstruction:
    r"""The least squares weights on the channels S that are left, zero on the others.

    $W_S = W^0_S + (G_{SS} + \lambda D)^{-1} (C_S - G_{SS} W^0_S)$ with D the diagonal of
    $G_{SS}$: what few rows do not see stays as in `start`, which is zero if not given.
    `left` may be traced: shapes do not depend on it.

    He et al., [Channel Pruning for Accelerating Very Deep Neural
    Networks](https://arxiv.org/abs/1707.06168), ICCV 2017, section 3.1.

    Args:
        gram: the Gram matrix of the inputs.
        cross: their products with the outputs that should stay.
        left: True for each channel that stays; may be traced.
        start: the weight until now; default None: zero.
        damping: how strongly `start` is kept where the inputs say little; default
            1e-5.

    Returns:
        The new weight, and what it explains of the energy of each output.
    """
    rows = jnp.tile(left, gram.shape[0] // left.size)[:, None]
    inner = jnp.where(rows & rows.T, gram, 0.0)
    right = jnp.where(rows, cross, 0.0)
    weight = jnp.zeros_like(right) if start is None else jnp.where(rows, start, 0.0)
    product = partial(jnp.matmul, precision="highest")
    weight = weight + solve(inner, right - product(inner, weight), damping)
    gain = jnp.sum(weight * (2 * right - product(inner, weight)), axis=0)
    return Reconstruction(weight, gain)


def _table(
    gram: Gram, cross: Weight, channels: int, damping: float | jax.Array
) -> Float[Array, "ins both"]:
    """The inverse and beside it the best weights, the taps of a channel together.

    Both are those of inputs of size one, of which the losses are the same.
    """
    size = gram.shape[0]
    turn = jnp.arange(size).reshape(-1, channels).T.reshape(-1)
    unit, scale = of_size_one(gram[turn][:, turn])
    right = [jnp.eye(size, dtype=gram.dtype), cross[turn] / scale]
    return solve(unit, jnp.concatenate(right, axis=1), damping)


def _losses(
    table: Float[Array, "ins both"], channels: int
) -> Float[Array, " {channels}"]:
    """What the error grows by without each channel."""
    size = table.shape[0]
    blocks = (channels, size // channels)
    own = jnp.einsum("iaib->iab", table[:, :size].reshape(*blocks, *blocks))
    weight = table[:, size:].reshape(*blocks, -1)
    solved = jnp.matmul(_inverses(own), weight, precision="highest")
    return jnp.sum(weight * solved, axis=(1, 2))


def _inverses(blocks: Float[Array, "n k k"]) -> Float[Array, "n k k"]:
    """The inverses of many small positive matrices, by Gauss and Jordan.

    A library's routine, called for each of thousands, would take most of the time.
    """

    def eliminate(j: jax.Array, a: jax.Array) -> jax.Array:
        column = a[:, :, j]
        row = a[:, j].at[:, j].set(1.0) / column[:, j, None]
        rest = a.at[:, :, j].set(0.0) - column[:, :, None] * row[:, None]
        return rest.at[:, j].set(row)

    return lax.fori_loop(0, blocks.shape[1], eliminate, blocks)


def _split(weight: Weight, channels: int) -> Float[Array, "taps channels outs"]:
    return weight.reshape(-1, channels, weight.shape[1])


def _positive(v: jax.Array) -> jax.Array:
    return jnp.where(v > 0, v, 1.0)
