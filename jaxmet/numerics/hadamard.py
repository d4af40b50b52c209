r"""Hadamard transforms: rotations that spread outliers over all channels.

A Hadamard matrix has entries of ±1 and orthogonal columns, so that $H / \sqrt n$ is a rotation in
which each result is a sum of all n values with equal weight: one value that is a hundred times as
large as the others becomes n values of one size. Sizes are $2^k m$: the Kronecker product of a
matrix of Paley's of order m, from a short table, and Sylvester's of order $2^k$.

Ashkboos et al., [QuaRot: Outlier-Free 4-Bit Inference in Rotated
LLMs](https://arxiv.org/abs/2404.00456), NeurIPS 2024.
"""

import functools
import math

import jax
import numpy as np
from jaxtyping import Float

from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array

ORDERS = {12: 11, 20: 19, 28: 13, 36: 17, 44: 43, 60: 59}
"""Orders of Paley's matrices that are no power of two, and the primes that give them."""

RADIX = 16
"""The largest power of two that one matrix product transforms."""


def hadamard_size(channels: int) -> int:
    r"""The largest size $2^k m$ of a known Hadamard matrix that divides a number of channels.

    Args:
        channels: how many values there are.

    Returns:
        The size of the blocks that are transformed; 1 where there is only the identity.
    """
    return math.prod(_factors(channels))


def hadamard(
    x: Float[Array, "*any"], axis: int = -1, *, inverse: bool = False
) -> Float[Array, "*any"]:
    r"""$x H / \sqrt n$ along an axis, in blocks of n = `hadamard_size` of its length.

    The order is Sylvester's, that of `scipy.linalg.hadamard`, within each row of Paley's matrix.
    It takes a product with a small matrix for each factor of n, $O(n \log n)$ operations in all.

    Args:
        x: a float array of at least one axis.
        axis: the axis along which it is transformed; default the last.
        inverse: whether the transform is undone; default False.

    Returns:
        An array of the same shape and dtype.
    """
    x = xp.moveaxis(x, axis, -1)
    *lead, channels = x.shape
    size = hadamard_size(channels)
    blocks = x.reshape(*lead, channels // size, size)
    shape = blocks.shape
    # Each product moves the digit that it transforms to the end: after all they are in order.
    for factor in _factors(channels):
        matrix = xp.asarray(_matrix(factor, inverse).astype(x.dtype))
        blocks = blocks.reshape(*shape[:-1], factor, size // factor)
        matrix = matrix if not xp.is_jax(x) else jax.numpy.asarray(matrix)
        blocks = xp.matmul(xp.swapaxes(blocks, -1, -2), matrix, precision="highest")
        blocks = blocks.reshape(shape)
    return xp.moveaxis(blocks.reshape(x.shape), -1, axis)


def block_means(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """The mean of each block that `hadamard` transforms along the last axis, at all its places.

    Of variances of values that know nothing of each other those of the transformed values.

    Args:
        x: a float array of at least one axis.

    Returns:
        An array of the same shape and dtype.
    """
    size = hadamard_size(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    means = xp.sum(blocks, axis=-1, keepdims=True) / size
    return xp.broadcast_to(means, blocks.shape).reshape(x.shape)


def rotated(
    x: Float[Array, "*any"], signs: Float[Array, "*ones"], *, inverse: bool = False
) -> Float[Array, "*any"]:
    r"""$x D H$, with random signs D, over all axes along which the signs run, taken as one.

    Args:
        x: a float array.
        signs: ±1, of the rank of `x` and size 1 along the other axes.
        inverse: whether the rotation is undone; default False.

    Returns:
        An array of the same shape and dtype.
    """
    axes = [i for i, size in enumerate(signs.shape) if size > 1]
    last = range(-len(axes), 0)
    moved = xp.moveaxis(x, axes, last)
    flat = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
    factor = signs.reshape((1,) * (flat.ndim - 1) + (-1,)).astype(x.dtype)
    if inverse:
        flat = hadamard(flat, inverse=True) * factor
    else:
        flat = hadamard(flat * factor)
    return xp.moveaxis(flat.reshape(moved.shape), last, axes)


def random_signs(key: Array, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """Signs of which each is +1 or -1 with equal probability.

    Args:
        key: the `jax.random.key` that they come from.
        shape: their shape.
        dtype: their dtype; default float32.

    Returns:
        The signs, an array of ±1.
    """
    return jax.random.rademacher(key, shape, dtype)


def _factors(channels: int) -> tuple[int, ...]:
    """The orders of the Kronecker factors of the largest known matrix."""
    every = (_factors_of(channels, order) for order in (1, *ORDERS))
    return max(every, key=math.prod)


def _factors_of(channels: int, order: int) -> tuple[int, ...]:
    """The orders of the matrices whose Kronecker product transforms blocks of channels."""
    if channels % order:
        return ()
    left, twos = channels // order, 0
    while left % 2 == 0 and left:
        left, twos = left // 2, twos + 1
    step = RADIX.bit_length() - 1
    powers = tuple(2 ** min(step, twos - i) for i in range(0, twos, step))
    return ((order,) if order > 1 else ()) + powers


@functools.cache
def _matrix(order: int, inverse: bool) -> np.ndarray:
    """A Hadamard matrix over the root of its order, in float64, or its transpose."""
    found = np.ones((1, 1))
    if order in ORDERS:
        found = _paley(order, ORDERS[order])
    else:
        while len(found) < order:
            found = np.kron([[1, 1], [1, -1]], found)
    return (found.T if inverse else found) / math.sqrt(order)


def _paley(order: int, prime: int) -> np.ndarray:
    """Paley's matrix: of his first construction where the order is one above the prime."""
    squares = {i * i % prime for i in range(1, prime)}
    residue = np.asarray([0] + [1 if i in squares else -1 for i in range(1, prime)])
    numbers = np.arange(prime)
    jacobsthal = residue[(numbers[:, None] - numbers[None, :]) % prime]
    core = np.zeros((prime + 1, prime + 1))
    core[0, 1:], core[1:, 1:] = 1, jacobsthal
    core[1:, 0] = -1 if order == prime + 1 else 1
    if order == prime + 1:
        return core + np.eye(order)
    diagonal = np.asarray([[1, -1], [-1, -1]])
    return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), diagonal)
