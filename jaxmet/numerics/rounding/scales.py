"""The best scales for given integers."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmet.numerics.ranges import SCALE_FLOOR
from jaxmet.numerics.rounding.levels import along_inputs


def refit_scales(
    levels: Float[Array, "groups ins outs"],
    scale: Float[Array, "groups blocks outs"],
    gram: Float[Array, "groups ins ins"],
    target: Float[Array, "groups ins outs"],
    shared: tuple[int, ...] = (),
) -> Float[Array, "groups blocks outs"]:
    """Least squares: $s = k^T G W^* / k^T G k$, where it is positive.

    Of several blocks each in turn is given its best scale beside the others. `shared` are
    those of the axes groups (0) and outs (2) along which there is one scale: numerator and
    denominator are sums over them.

    Args:
        levels: the integers less the zero point.
        scale: the scales until now.
        gram: the Gram matrix of the inputs.
        target: what the product of levels and scales should be.
        shared: the axes, groups (0) and outs (2), along which there is one scale; default none.

    Returns:
        The new scales, of the same shape.
    """
    blocks, length = scale.shape[1], levels.shape[1] // scale.shape[1]
    error = target - along_inputs(scale, levels.shape[1]) * levels
    residual = jnp.matmul(gram, error, precision="highest")

    def one(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple:
        scale, residual = state
        cut = lambda v, n, axis: lax.dynamic_slice_in_dim(v, b * n, n, axis)
        k = cut(levels, length, 1)
        product = jnp.matmul(cut(gram, length, 2), k, precision="highest")
        sums = lambda v: jnp.sum(v, axis=tuple({1, *shared}), keepdims=True)
        gain = sums(k * cut(residual, length, 1))
        curvature = sums(k * cut(product, length, 1))
        old = cut(scale, 1, 1)
        new = old + gain / jnp.where(curvature > 0, curvature, 1.0)
        usable = (curvature > 0) & (new >= SCALE_FLOOR) & jnp.isfinite(new)
        new = jnp.where(usable, new, old)
        residual = residual - (new - old) * product
        return lax.dynamic_update_slice_in_dim(scale, new, b, 1), residual

    return lax.fori_loop(0, blocks, one, (scale, residual))[0]
