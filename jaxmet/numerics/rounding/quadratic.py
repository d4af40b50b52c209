r"""The error of a layer's output as a quadratic form in its weights.

With $x$ the inputs of the float network and $\hat x$ those of the quantized one,
$G = E\,\hat x\hat x^T$, $C = E\,\hat x x^T$ and $F = E\,x x^T$ are all that the error

$$L(\hat W) = E\,|x W - \hat x \hat W|^2$$

knows of the data. Without $C$ the inputs of both are the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Gram = Float[Array, "groups ins ins"]
Weight = Float[Array, "groups ins outs"]
Mean = Float[Array, "groups ins"]


class Products(NamedTuple):
    """G, and C and F where the float inputs are others."""

    gram: Gram
    cross: Gram | None = None
    energy: Gram | None = None


def quadratic(error: Weight, gram: Gram) -> Float[Array, "groups outs"]:
    """$e^T G e$ of each output, never below zero.

    Args:
        error: the error of a weight.
        gram: the Gram matrix of the inputs.

    Returns:
        The squared error of each output.
    """
    product = jnp.matmul(gram, error, precision="highest")
    return jnp.maximum(jnp.sum(error * product, axis=1), 0.0)


@jax.jit
def output_error(
    weight: Weight, rounded: Weight, products: Products
) -> Float[Array, "groups outs"]:
    r"""$L(\hat W)$ of each output; without F, less its value at $\hat W = W$.

    With $e = \hat W - W$ it is
    $e^T G e - 2 e^T (C - G) W + W^T (F - C - C^T + G) W$, where nothing large cancels.

    Args:
        weight: the float weight.
        rounded: the rounded one, of the same shape.
        products: the products of the inputs.

    Returns:
        The squared error of each output.
    """
    gram, cross, energy = products
    error = rounded - weight
    loss = quadratic(error, gram)
    if cross is None:
        return loss
    pull = jnp.matmul(cross - gram, weight, precision="highest")
    loss = loss - 2 * jnp.sum(error * pull, axis=1)
    if energy is None:
        return loss
    moved = energy - cross - jnp.swapaxes(cross, 1, 2) + gram
    return jnp.maximum(loss + quadratic(weight, moved), 0.0)


def damped(gram: Gram, damping: float | Float[Array, ""]) -> Gram:
    r"""$G + \lambda I$, with $\lambda$ so much of the mean of the diagonal.

    As the form of an error it also counts $\lambda |\hat W - W|^2$: what few data do not
    see is not free. A Gram matrix of zeros stands for one of size 1.

    Args:
        gram: a Gram matrix.
        damping: λ, as a share of the mean of the diagonal.

    Returns:
        The damped matrix.
    """
    identity = jnp.eye(gram.shape[1], dtype=gram.dtype)[None]
    return gram + damping * _size(gram) * identity


@jax.jit
def best_weight(
    weight: Weight, products: Products, damping: float | Float[Array, ""] = 0.01
) -> Weight:
    r"""The real weights that serve the quantized inputs best.

    $W^* = W + (G + \lambda I)^{-1} (C - G) W$ minimises $L(\hat W) + \lambda|\hat W-W|^2$,
    which is $(\hat W - W^*)^T (G + \lambda I)(\hat W - W^*)$ and a constant. What an input
    that is always zero reads stays unchanged. Without C it is W.

    Hubara et al., [Improving Post Training Neural Quantization: Layer-wise Calibration and
    Integer Programming](https://arxiv.org/abs/2006.10518), ICML 2021, the sequential case.

    Args:
        weight: the float weight.
        products: the products of the inputs.
        damping: how strongly the weight is kept where the inputs say little; default 0.01.

    Returns:
        The real weight W*.
    """
    gram, cross, _ = products
    if cross is None:
        return weight
    pull = jnp.matmul(cross - gram, weight, precision="highest")
    # In units of the Gram matrix: squares of extreme inputs would leave the floats.
    size = _size(gram)
    factor = damped_cholesky(gram, damping)
    return weight + jax.vmap(lambda l, b: _solve(l, b))(factor, pull / size)


def damped_cholesky(gram: Gram, damping: float | Float[Array, ""]) -> Gram:
    r"""The lower factor of $G/g + \lambda I$, with g the mean of the diagonal of G.

    Where rounding errors of a singular matrix are larger than the damping, there is ten
    times as much of it until there is a factor.

    Args:
        gram: G, symmetric and positive semidefinite, a float array (groups, ins, ins).
        damping: λ, as a share of the mean of the diagonal; at least what rounding errors take is
            used.

    Returns:
        The lower triangular factors, (groups, ins, ins).
    """
    ins = gram.shape[1]
    unit, identity = gram / _size(gram), jnp.eye(ins, dtype=gram.dtype)
    least = ins * float(jnp.finfo(gram.dtype).eps)
    start = jnp.maximum(jnp.asarray(damping, gram.dtype), least)

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        _, lacking = state
        return jnp.any(lacking > 0)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        factor, lacking = state
        new = jnp.linalg.cholesky(unit + lacking * identity[None])
        bad = ~jnp.all(jnp.isfinite(new), axis=(1, 2), keepdims=True)
        factor = jnp.where(lacking > 0, new, factor)
        more = lacking < 1e6  # of what is not finite itself there is no factor
        return factor, jnp.where(bad & more, 10 * lacking, 0.0)

    lacking = jnp.broadcast_to(start, (gram.shape[0], 1, 1))
    return lax.while_loop(unfinished, again, (jnp.zeros_like(gram), lacking))[0]


def centred(products: Products, mean: Mean, float_mean: Mean | None = None) -> Products:
    r"""Covariances from second moments: the error that the bias cannot take.

    $E|xW - \hat x\hat W + b|^2$ is least for $b$ = `bias_correction`, and then what is left
    is the same form in $G - \hat m\hat m^T$, $C - \hat m m^T$ and $F - m m^T$.

    Args:
        products: the second moments G, C and F of the inputs.
        mean: the mean of the quantized inputs, (groups, ins).
        float_mean: that of the float inputs; default None: the same.

    Returns:
        The covariances; None where there was no second moment.
    """
    other = mean if float_mean is None else float_mean

    def less(product: Gram, left: Mean, right: Mean) -> Gram:
        return product - left[:, :, None] * right[:, None]

    gram, cross, energy = products
    return Products(
        less(gram, mean, mean),
        None if cross is None else less(cross, mean, other),
        None if energy is None else less(energy, other, other),
    )


@jax.jit
def bias_correction(
    weight: Weight, rounded: Weight, mean: Mean, float_mean: Mean | None = None
) -> Float[Array, "groups outs"]:
    r"""What the bias gains so that the mean output stays: $m W - \hat m \hat W$.

    Args:
        weight: the float weight.
        rounded: the rounded one, of the same shape.
        mean: the mean of the quantized inputs.
        float_mean: that of the float inputs; default None: the same.

    Returns:
        What is added to the bias of each output.
    """
    shift = -jnp.einsum("gi,gio->go", mean, rounded - weight, precision="highest")
    if float_mean is None:
        return shift
    apart = float_mean - mean
    return shift + jnp.einsum("gi,gio->go", apart, weight, precision="highest")


def _size(gram: Gram) -> Float[Array, "groups 1 1"]:
    """The mean of the diagonal; 1 if it is zero."""
    size = jnp.mean(jnp.diagonal(gram, axis1=1, axis2=2), axis=1)
    return jnp.where(size > 0, size, 1.0)[:, None, None]


def _solve(factor: Float[Array, "n n"], right: Float[Array, "n m"]) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, True), right)
