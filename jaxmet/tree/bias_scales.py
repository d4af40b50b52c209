"""The scales of int32 biases: those of a weight and of its input, in the axes of the bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.ranges import SCALE_FLOOR

INT32_ENDS = (-(2.0**31), 2.0**31 - 128)  # the float32 numbers nearest inside int32


def along_scale(bias: jax.Array, scale: jax.Array) -> jax.Array:
    """One number per bias in the axes of its weight's scale: the largest where one is shared."""
    sizes = tuple(n for n in scale.shape if n > 1)
    of_bias = tuple(n for n in bias.shape if n > 1)
    if sizes == of_bias:
        return bias.reshape(scale.shape)
    if sizes == bias.shape[-1:]:
        return jnp.max(bias, axis=range(bias.ndim - 1)).reshape(scale.shape)
    if sizes == bias.shape[:1]:
        return jnp.max(bias, axis=range(1, bias.ndim)).reshape(scale.shape)
    return jnp.max(bias).reshape((1,) * scale.ndim)


def bias_scale(s_w: Any, s_x: Any, bias: np.ndarray, name: str) -> np.ndarray:
    """The scale of an int32 bias, s_w s_x, one for each of its numbers."""
    s_x = s_x.astype(s_w.dtype)
    scale = along_bias(s_w, bias, name) * along_bias(s_x, bias, name)
    return np.maximum(np.broadcast_to(scale, bias.shape), SCALE_FLOOR**2)


def along_bias(scale: Any, bias: Any, name: str) -> Any:
    """A weight's or activation's scale in the axes of the bias of its product.

    Per channel it lies along the last axes; with one scale a stacked layer, along the
    first one.
    """
    sizes = tuple(n for n in scale.shape if n > 1)
    of_bias = tuple(n for n in bias.shape if n > 1)
    if sizes in ((), of_bias):
        return scale.reshape(bias.shape if sizes else (1,) * bias.ndim)
    for shape in (bias.shape[-1:], bias.shape[:1]):
        if sizes == shape:
            before = bias.ndim - 1 if shape == bias.shape[-1:] else 0
            after = bias.ndim - 1 - before
            return scale.reshape((1,) * before + sizes + (1,) * after)
    raise ValueError(
        f"jaxmet.quantize_weights: the bias {name!r} of shape {bias.shape} cannot take "
        f"a product with scales of shape {scale.shape}. Use bias='float' for it."
    )
